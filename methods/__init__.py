"""One file a method: its settings, its control, its step, in the paper's symbols."""
