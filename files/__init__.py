"""Files that appear whole or not at all, and tensors read from them chunk by chunk."""
