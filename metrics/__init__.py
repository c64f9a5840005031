"""How well an edit edited, kept and held still."""
