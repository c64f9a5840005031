"""`fatezero benchmark`: cases of demo scenes, the methods compared on them, figures, tables."""
