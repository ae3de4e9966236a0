"""Where samples lie: patterns of shards, stores and cache, tar files and their index."""
