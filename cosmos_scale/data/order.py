"""The order of the data: the k-th sample of epoch e as a pure function of (seed, e, k).

World size, workers and restarts have no part in it. Per epoch the shards are shuffled and laid end to end; this stream
is cut into windows of a fixed number of samples, and each window is shuffled in itself. So a window reads few shards,
each of them once, and any position is reached by arithmetic: no pass over samples, nothing read but the shards' counts.

Shuffles are the order of raw 64-bit draws of the counter-based generator Philox. Its draws are the same in every numpy
version (those of `Generator.permutation` need not be), so a run can be resumed after an upgrade.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from cosmos_scale.errors import UserError

Positions = NDArray[np.int64]

# Second word of the Philox key: draws for the order share no stream with the draws for crops and captions.
_SHARD_STREAM, _WINDOW_STREAM, _SUBSTITUTE_STREAM = 0x5348415244, 0x57494E444F57, 0x53554253
_FEWEST_SUBSTITUTES = 1024  # an epoch's last window may hold a single sample
_KEPT = 4  # shuffles kept: a batch touches at most two windows and two epochs unless it is larger than a window

_Key = TypeVar("_Key", bound=Hashable)
_Shuffle = TypeVar("_Shuffle")


class _Stream(NamedTuple):
    """One epoch's shards end to end: where in the stream each starts and ends, and the id of its first sample."""

    starts: Positions
    ends: Positions
    first_ids: Positions


class EpochOrder:
    """The order of every epoch over shards of given sample counts.

    shard_samples: samples in each shard, in the index's order; sample ids count through them.
    window: samples shuffled together. Larger mixes better and reads more shards at a time; costs 8 bytes a sample.
    """

    def __init__(self, shard_samples: Positions, seed: int, window: int) -> None:
        self.shard_samples = np.asarray(shard_samples, dtype=np.int64)
        self.samples = int(self.shard_samples.sum())
        if self.samples < 1 or window < 1:
            raise ValueError(f"{self.samples} samples in windows of {window}: both must be at least 1")
        self.seed = seed
        self.window = window
        self._streams: OrderedDict[int, _Stream] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], Positions] = OrderedDict()

    def sample(self, epoch: int, position: int) -> int:
        """Return the id of the sample at one position of an epoch."""
        return int(self.sample_ids(epoch, np.array([position]))[0])

    def sample_ids(self, epoch: int, positions: Positions) -> Positions:
        """Return the ids of the samples at some positions of an epoch.

        Positions past the epoch's end stand for its first samples again: so an incomplete last batch is padded.
        """
        positions = np.asarray(positions, dtype=np.int64) % self.samples
        windows = positions // self.window
        places = np.empty_like(positions)
        for window in np.unique(windows).tolist():
            here = windows == window
            first = window * self.window
            places[here] = first + self._window(epoch, window)[positions[here] - first]
        return self._ids(epoch, places)

    def substitute(self, epoch: int, position: int, attempt: int) -> int:
        """Return the id of the sample that stands in for a damaged one; attempts count from 0.

        It is another sample (where there is one) of about the same window, so from shards that are being read anyway.
        """
        position %= self.samples
        reach = min(max(self.window, _FEWEST_SUBSTITUTES), self.samples)
        first = min(position // self.window * self.window, self.samples - reach)
        draw = int(_draws(self.seed, _SUBSTITUTE_STREAM, (attempt, position, epoch), 1)[0])
        distance = 1 + (draw * (reach - 1) >> 64)
        return self.sample(epoch, first + (position - first + distance) % reach)

    def _ids(self, epoch: int, places: Positions) -> Positions:
        stream = _recall(self._streams, epoch, lambda: self._shuffle_shards(epoch))
        shards = np.searchsorted(stream.ends, places, side="right")  # "right" steps over shards without samples
        return np.asarray(stream.first_ids[shards] + places - stream.starts[shards])

    def _shuffle_shards(self, epoch: int) -> _Stream:
        order = _permutation(self.seed, _SHARD_STREAM, (0, 0, epoch), len(self.shard_samples))
        lengths = self.shard_samples[order]
        ends = np.cumsum(lengths)
        first_ids = (np.cumsum(self.shard_samples) - self.shard_samples)[order]
        return _Stream(ends - lengths, ends, first_ids)

    def _window(self, epoch: int, window: int) -> Positions:
        length = min(self.window, self.samples - window * self.window)
        return _recall(
            self._windows,
            (epoch, window),
            lambda: _permutation(self.seed, _WINDOW_STREAM, (0, window, epoch), length),
        )


def steps_per_epoch(samples: int, global_batch: int, last_batch: str, multiple: int) -> int:
    """Return the steps of an epoch of `samples` samples.

    last_batch: "drop" leaves an incomplete last batch out, "pad" fills it. multiple: the steps are rounded up to a
    multiple of it; positions past the epoch's end then stand for its first samples again.
    Raises: UserError where not one step is left.
    """
    steps = samples // global_batch if last_batch == "drop" else -(-samples // global_batch)
    if steps == 0:
        raise UserError(
            f"train.global_batch is {global_batch}, but the data has {samples} samples: "
            "with data.last_batch: drop an epoch must hold at least one batch"
        )
    return -(-steps // multiple) * multiple


def _draws(seed: int, stream: int, place: tuple[int, int, int], count: int) -> NDArray[np.uint64]:
    """Draw 64-bit numbers as a function of (seed, stream, place); the first counter word counts them."""
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    counter = np.array([0, *place], dtype=np.uint64)
    return np.asarray(np.random.Philox(key=key, counter=counter).random_raw(count))


def _permutation(seed: int, stream: int, place: tuple[int, int, int], length: int) -> Positions:
    return np.argsort(_draws(seed, stream, place, length), kind="stable")


def _recall(kept: "OrderedDict[_Key, _Shuffle]", key: _Key, make: Callable[[], _Shuffle]) -> _Shuffle:
    """Return kept[key], made where it is missing; the least recently used of more than a few is let go."""
    if key not in kept:
        kept[key] = make()
        if len(kept) > _KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
