"""The description of an edit, shared by the command, the nodes, Python, batches and benchmarks."""
