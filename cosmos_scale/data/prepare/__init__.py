"""Preparation of the published datasets: caption files joined with downloaded images, written as indexed shards.

Four stages, each of which keeps what it has done, so that a run that was stopped goes on where it was:
captions -> a table on disk from join value to place in the captions file (`table`);
images -> the captions row of each image, from the download's metadata alone (`matching`);
pairs -> one shard for each shard of images, over all processes (`writing`);
at last the index, `rejected.jsonl` and `manifest.json` (`manifest`).
"""
