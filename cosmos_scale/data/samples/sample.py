"""A sample's key and random streams, and how damaged samples and unreachable shards are reported."""

import re
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence

from cosmos_scale.errors import UserError

VIEW_STREAM = 0
CAPTION_STREAM = 1


class SampleKey(NamedTuple):
    """All randomness of a sample is a function of these four integers.

    seed: the run's seed. epoch: from 0. sample: position in the merged index of all sources.
    repeat: which of the sample's visits in the epoch, from 0; above 0 only in a source with a weight above 1.
    """

    seed: int
    epoch: int
    sample: int
    repeat: int = 0


def sample_generator(key: SampleKey, stream: int) -> np.random.Generator:
    """Open one random stream of one sample; call only its `.random()`.

    Philox-4x64 takes (seed, epoch) as its key; (repeat, sample, stream) are the high words of its counter, so streams
    never overlap (they lie 2^64 blocks apart). Form every other distribution from uniform doubles by plain arithmetic:
    NumPy does not promise that its own distributions stay the same from version to version.
    """
    # Arrays, not lists: NumPy reads a list that mixes integers below and above 2^63 as floats.
    key_words = np.array([key.seed, key.epoch], dtype=np.uint64)
    counter = np.array([0, key.repeat, key.sample, stream], dtype=np.uint64)
    as_key: Any = _AsKey(key_words)  # NumPy's annotations know only NumPy's own class for seeds
    return np.random.Generator(np.random.Philox(as_key, counter=counter))


class _AsKey(ISeedSequence):
    """Words that become Philox's key as they are.

    NumPy's own argument `key` does the same, but gathers entropy before, for nothing.
    """

    def __init__(self, words: npt.NDArray[np.uint64]) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> npt.NDArray[np.uint64]:
        return self._words


class DamagedSample(Exception):
    """A sample that cannot be used; the text says why.

    The loader counts the sample, logs its shard and key, and puts another sample in its place.
    origin: where the sample was built from, if its json was read and says it.
    """

    origin: str | None = None


def reason_class(reason: str, *, numbers: bool = True) -> str:
    """Return the part of a reason that samples share: "damaged JPEG: 3 bytes missing" counts as "damaged JPEG".

    What stands behind a semicolon is of one sample too. numbers: False puts N in the place of each number; the digits
    of a name, such as sha256, are no number.
    """
    shared = reason.split(": ")[0].split("; ")[0]
    return shared if numbers else re.sub(r"(?<![A-Za-z0-9_])\d+", "N", shared)


class UnreachableShard(UserError):
    """A shard that cannot be reached any more, after all retries: none of its samples can be used.

    A UserError, for callers that cannot go on without the shard. shard: its path or URL, secrets left out.
    """

    def __init__(self, source: str, shard: str, reason: str) -> None:
        super().__init__(source, shard, reason)
        self.source, self.shard, self.reason = source, shard, reason

    def __str__(self) -> str:
        return f"{self.shard}: shard of source {self.source} cannot be opened any more: {self.reason}"
