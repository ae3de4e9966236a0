"""What the data commands do: build, verify and inspect shards."""
