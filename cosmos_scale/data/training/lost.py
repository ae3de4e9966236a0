"""Shards that the run has given up: from which step on, and which samples lie in them.

A lost shard changes the batches, so all ranks must give up the same shards from the same step on. A shard's name is its
source's name and its own name within the source: the same on every rank, wherever the rank's files lie.
"""

from collections.abc import Iterable, Mapping
from contextlib import closing
from itertools import islice

import numpy as np

from cosmos_scale.config import RunConfig
from cosmos_scale.data.shards.index import MergedIndex
from cosmos_scale.data.shards.reader import Folders, ShardFile, ShardReader
from cosmos_scale.data.shards.store import is_remote
from cosmos_scale.errors import UserError


class LostShards:
    """The shards that were given up, by name, each with the step from which on substitutes replace its samples."""

    def __init__(self, index: MergedIndex, steps: Mapping[str, int]) -> None:
        self.steps = dict(steps)
        self._index = index
        self.names = [f"{source.name}/{row.name}" for source in index.sources for row in source.rows]
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._samples = index.shard_samples
        self._ends = np.cumsum(index.shard_samples)

    def add(self, names: Iterable[str], step: int) -> None:
        """Give up shards from a step on; shards that were given up before keep their step."""
        for name in names:
            self.steps.setdefault(name, step)

    def shard_of(self, sample: int) -> str:
        """Return the name of the shard that a sample lies in."""
        return self.names[int(np.searchsorted(self._ends, sample, side="right"))]

    def file(self, name: str) -> ShardFile:
        """Return where a shard lies."""
        return next(islice(self._index.shard_files(), self._numbers[name], None))

    def kept(self) -> list[int]:
        """Return the places in the index of the shards that were not given up."""
        return [place for place, name in enumerate(self.names) if name not in self.steps]

    def missing(self) -> dict[str, str]:
        """Return the shards that this machine lacks and that were not given up: by name, the reasons."""
        folders, reasons = Folders(), {}
        for name, file in zip(self.names, self._index.shard_files(), strict=True):
            try:
                if name not in self.steps and not is_remote(file.address):
                    folders.require(file.address)
            except OSError as error:
                reasons[name] = error.strerror or str(error)
        return reasons

    def holds(self, sample: int, step: int) -> bool:
        """Return whether a sample lies in a shard that is lost at a step."""
        return bool(self.steps) and self.steps.get(self.shard_of(sample), step + 1) <= step

    def samples(self, names: Iterable[str]) -> int:
        """Return how many samples some shards hold."""
        return sum(int(self._samples[self._numbers[name]]) for name in names)

    def share(self, more: Iterable[str] = ()) -> float:
        """Return the share of all samples that is lost, or that would be lost with some more shards."""
        return self.samples({*self.steps, *more}) / int(self._ends[-1])


def check_shards(index: MergedIndex, config: RunConfig, lost_shards: Mapping[str, int], *, resumed: bool) -> None:
    """Look for the shards of a run before its first step, and for the tables of their samples.

    lost_shards: the shards that the run has given up, which may be missing. resumed: whether the run goes on from a
    checkpoint.
    Raises: UserError where a shard of a new run is missing: the shard was never there. A resumed run gives a missing
    shard up when the shard is needed. So there it is an error only that more is missing than data.max_damaged allows: a
    forgotten disk shows at once, and not shard by shard.
    """
    lost = LostShards(index, lost_shards)
    if not resumed:
        files = list(index.shard_files())
        with closing(ShardReader(config.data.remote)) as reader:
            reader.check(files[place] for place in lost.kept())
        index.check_tables(lost.kept())
        return
    missing, limit = lost.missing(), config.data.max_damaged
    share = lost.share(missing)
    if missing and share > limit:
        name = next(iter(missing))
        raise UserError(
            f"shard {name} is missing: {missing[name]}; {len(missing)} missing shards, and those lost before, hold "
            f"{share:.2%} of all samples, more than data.max_damaged {limit:g} allows"
        )
