"""From an index to batches: the global order, the loader and its processes, what becomes of damage and loss."""
