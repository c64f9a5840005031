"""A harder world of 128 pixels: things that cross, hide one another and move their parts, before a moving camera."""
