"""DDIM steps, their inversion and the editing loop."""
