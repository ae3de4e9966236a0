"""Sources with the sizes of Merged30M, without any files: enough for the order of the data."""

import numpy as np

from cosmos_scale.data.shards.index import SourceShards

MERGED = {"CC3M": (2_823_019, 670), "CC12M": (10_010_225, 2377), "YFCC15M": (14_065_827, 3341)}
"""Samples and shards of each source."""


def merged_sources() -> list[SourceShards]:
    """Return three sources of real sizes; a source's shards differ by one sample at most."""
    return [SourceShards(np.diff(np.arange(shards + 1) * samples // shards)) for samples, shards in MERGED.values()]
