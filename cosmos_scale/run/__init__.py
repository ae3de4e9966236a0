"""A run around its steps: start, progress, metrics, the dry run, the next batch."""
