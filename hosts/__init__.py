"""How a host's models are loaded, hooked and called: diffusers and ComfyUI."""
