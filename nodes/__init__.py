"""What a ComfyUI user drags: one module for each family of nodes."""
