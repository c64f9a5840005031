"""The methods, one file each: settings, what they do to attention, features and latents, their paper's equations."""
