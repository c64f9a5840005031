"""ComfyUI as a host: how its models are hooked and sampled."""
