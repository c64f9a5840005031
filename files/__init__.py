"""Files written atomically, and tensors read from them chunk by chunk."""
