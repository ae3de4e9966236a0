"""What tests, benchmarks and tools share: tiny runs, ranks, random batches, shard files, the published step, races."""
