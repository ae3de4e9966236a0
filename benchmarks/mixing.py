"""How evenly three sources are mixed through an epoch: our order, and the buffer shuffle of the published loader.

Sources and shards have the sizes of Merged30M. The published loader lists the sources one after the other and shuffles
this list of shards with a buffer (2,000 shards, starting at 500) before it reads them. Its second buffer, of 5,000
samples, is smaller than a window and left out here. Each source's share of every stretch of 65,536 samples is compared
with its share of the epoch.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/mixing.py`

import numpy as np
from numpy.typing import NDArray
from webdataset.filters import shuffle

from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.data.shards.index import SourceShards
from cosmos_scale.data.training.order import EpochOrder
from cosmos_scale.testing.merged import merged_sources

WINDOW = 65536
SHARD_BUFFER, SHARDS_FIRST = 2000, 500


def share_errors(of_visits: NDArray[np.int64], sources: Sequence[SourceShards]) -> NDArray[np.float64]:
    """Return by how much each source's share of each whole window is off. of_visits: the source of every visit."""
    of_windows = of_visits[: len(of_visits) // WINDOW * WINDOW].reshape(-1, WINDOW)
    counts = np.stack([(of_windows == number).sum(axis=1) for number in range(len(sources))], axis=1)
    sizes = np.array([source.samples.sum() for source in sources])
    return np.asarray(abs(counts / WINDOW - sizes / sizes.sum()))


def ours(sources: Sequence[SourceShards]) -> NDArray[np.int64]:
    """Return the source of every visit of an epoch in our order."""
    order = EpochOrder(sources, 0, WINDOW)
    ends = np.cumsum([source.samples.sum() for source in sources])
    stretches = (np.arange(first, min(first + WINDOW, order.samples)) for first in range(0, order.samples, WINDOW))
    return np.concatenate([np.searchsorted(ends, order.sample_ids(0, each), side="right") for each in stretches])


def buffer_shuffled(sources: Sequence[SourceShards]) -> NDArray[np.int64]:
    """Return the source of every visit of an epoch where a buffer shuffles the list of shards."""
    listed = [(number, int(count)) for number, source in enumerate(sources) for count in source.samples]
    shuffled = list(shuffle(SHARD_BUFFER, initial=SHARDS_FIRST, rng=random.Random(0))(iter(listed)))
    numbers, counts = zip(*shuffled, strict=True)
    return np.repeat(numbers, counts)


def main() -> int:
    parser = argument_parser("mixing", "How evenly three sources are mixed through an epoch.", [""])
    arguments = parser.parse_args()
    sources = merged_sources()
    shards = sum(len(source.samples) for source in sources)
    note = f"stretches of {WINDOW:,} samples, {shards:,} shards of three sources, off the natural share"
    figures = []
    for name, what, of_visits in (
        ("ours", "this order", ours(sources)),
        ("buffer", f"buffer of {SHARD_BUFFER:,} shards", buffer_shuffled(sources)),
    ):
        errors = share_errors(of_visits, sources)
        figures.append(Figure(f"mixing_worst_error_{name}", float(errors.max()), "of a window", f"{what}: {note}"))
        figures.append(Figure(f"mixing_mean_error_{name}", float(errors.mean()), "of a window", f"{what}: {note}"))
    report("Sources in every window", figures, arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
