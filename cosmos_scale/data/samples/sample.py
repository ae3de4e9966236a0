"""What identifies one draw of one sample, and how damaged samples and unreachable shards are reported."""

import re
from typing import NamedTuple

from cosmos_scale.errors import UserError


class SampleKey(NamedTuple):
    """All randomness of a sample is a function of these four integers.

    seed: the run's seed. epoch: from 0. sample: position in the merged index of all sources.
    repeat: which of the sample's visits in the epoch, from 0; above 0 only in a source with a weight above 1.
    """

    seed: int
    epoch: int
    sample: int
    repeat: int = 0


class DamagedSample(Exception):
    """A sample that cannot be used; the text says why.

    The loader counts the sample, logs its shard and key, and puts another sample in its place.
    origin: where the sample was built from, if its json was read and says it.
    """

    origin: str | None = None


def reason_class(reason: str, *, numbers: bool = True) -> str:
    """Return the part of a reason that samples share: "damaged JPEG: 3 bytes missing" counts as "damaged JPEG".

    numbers: False puts N in the place of each number.
    """
    shared = reason.split(": ")[0]
    return shared if numbers else re.sub(r"\d+", "N", shared)


class UnreachableShard(UserError):
    """A shard that cannot be reached any more, after all retries: none of its samples can be used.

    A UserError, for callers that cannot go on without the shard. shard: its path or URL, secrets left out.
    """

    def __init__(self, source: str, shard: str, reason: str) -> None:
        super().__init__(source, shard, reason)
        self.source, self.shard, self.reason = source, shard, reason

    def __str__(self) -> str:
        return f"{self.shard}: shard of source {self.source} cannot be opened any more: {self.reason}"
