"""What an edit is, for every door: command, nodes, Python, batches and benchmarks."""
