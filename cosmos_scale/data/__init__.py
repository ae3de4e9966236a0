"""From shards to batches: index, order, plans, captions, decoders, loader."""
