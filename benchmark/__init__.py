"""`fatezero benchmark`: cases of the demo world, the rows compared on them, figures, tables."""
