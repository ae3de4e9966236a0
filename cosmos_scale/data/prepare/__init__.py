"""Preparation of the published datasets: caption files joined with downloaded images, written as indexed shards.

A preparation has four stages. Each keeps its results, so that a preparation that was stopped goes on where it was:
captions -> a table on disk from join value to place in the captions file (`table`);
images -> the captions row of each image, from the download's metadata alone (`matching`);
pairs (`pairing`) -> one shard for each shard of images, over all processes (`writing`);
at last the index, `rejected.jsonl` and `manifest.json` (`manifest`).
"""
