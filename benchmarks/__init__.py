"""What edits are worth and what they cost: the scripts and results of this folder, and `quality` of the command."""
