"""The commands: for each its options and what it does."""
