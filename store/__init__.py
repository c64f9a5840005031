"""The attention store: records, memories, budget, disk."""
