"""Checkpoints of other programs: which forms there are, what is in one, and its weights under our names."""
