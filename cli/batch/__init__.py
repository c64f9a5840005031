"""Many edits of one file of jobs: on the processes of a machine, on a Ray cluster, or on ComfyUI servers."""
