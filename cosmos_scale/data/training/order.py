"""The order of the data: the k-th visit of epoch e as a pure function of (seed, e, k).

World size, workers and restarts do not change the order. In each epoch every source is a stream of its own: the
source's shards, shuffled and laid end to end, in several passes where the source's weight asks for them. The epoch is
cut into windows of a fixed number of samples. A window takes from each stream the source's share of the epoch, going on
where the window before it stopped, and is shuffled in itself. So each window holds the sources in their proportions, to
a sample or two, and reads few shards, each of them once a pass. Any position is reached by arithmetic: there is no pass
over samples, and only the shards' counts are read.

A shuffle is the order of raw 64-bit draws of the counter-based generator Philox. Philox's draws are the same in every
numpy version (the draws of `Generator.permutation` need not be), so a run can be resumed after an upgrade.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from cosmos_scale.config import RunConfig
from cosmos_scale.data.shards.index import SourceShards
from cosmos_scale.errors import UserError
from cosmos_scale.words import counted

Positions = NDArray[np.int64]

# Second word of the Philox key: draws for the order share no stream with the draws for crops and captions.
_SHARD_STREAM, _WINDOW_STREAM, _SUBSTITUTE_STREAM = 0x5348415244, 0x57494E444F57, 0x53554253
_PART_STREAM, _ROUNDING_STREAM = 0x50415254, 0x524F554E44
_FEWEST_SUBSTITUTES = 1024  # an epoch's last window may hold a single sample
_KEPT = 4  # windows and epochs kept: a batch touches at most two of each, unless the batch is larger than a window

_Key = TypeVar("_Key", bound=Hashable)
_Made = TypeVar("_Made")


class Visits(NamedTuple):
    """Visits in their order. samples: ids in the merged index; repeats: which of the sample's visits, from 0."""

    samples: Positions
    repeats: Positions


class _Stream(NamedTuple):
    """One source's epoch as stretches end to end: each stretch's shard, its pass, and its place in the stream."""

    shards: Positions
    passes: Positions
    starts: Positions
    ends: Positions


class EpochOrder:
    """The order of every epoch over sources of given shards.

    A source of weight w is visited `SourceShards.visits` times an epoch, in passes. In a whole pass every sample comes
    once. Where w is no whole number, a last pass visits a part of the samples. Every shard gives its share of this
    part, rounded up or down; the samples are drawn anew each epoch, each as likely as any other. Passes follow one
    another: a sample's visits lie far apart, unless its source is smaller than the source's share of a window.

    sources: sample ids count through their shards in this order.
    window: samples shuffled together. A larger window mixes better, reads more shards at a time, and costs 24 bytes a
    sample.
    """

    def __init__(self, sources: Sequence[SourceShards], seed: int, window: int) -> None:
        self._counts = [np.asarray(source.samples, dtype=np.int64) for source in sources]
        sizes = [int(counts.sum()) for counts in self._counts]
        if not sizes or min(sizes) < 1 or window < 1:
            raise ValueError(f"sources of {sizes} samples in windows of {window}: each must be at least 1")
        firsts = np.cumsum([0, *sizes])
        self._first_ids = [
            first + np.cumsum(counts) - counts for first, counts in zip(firsts, self._counts, strict=False)
        ]
        self._visits = [source.visits for source in sources]
        self.samples = sum(self._visits)
        self.seed = seed
        self.window = window
        self._streams: OrderedDict[int, list[_Stream]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], Visits] = OrderedDict()

    def sample(self, epoch: int, position: int) -> int:
        """Return the id of the sample at one position of an epoch."""
        return int(self.sample_ids(epoch, np.array([position]))[0])

    def sample_ids(self, epoch: int, positions: Positions) -> Positions:
        """Return the ids of the samples at some positions of an epoch, as `visits` does."""
        return self.visits(epoch, positions).samples

    def visits(self, epoch: int, positions: Positions) -> Visits:
        """Return which samples come at some positions of an epoch.

        Positions past the epoch's end stand for the epoch's first samples again, which pads an incomplete last batch.
        """
        positions = np.asarray(positions, dtype=np.int64) % self.samples
        windows = positions // self.window
        found = Visits(np.empty_like(positions), np.empty_like(positions))
        for window in np.unique(windows).tolist():
            here = windows == window
            places = positions[here] - window * self.window
            for field, whole in zip(found, self._window(epoch, window), strict=True):
                field[here] = whole[places]
        return found

    def substitute(self, epoch: int, position: int, attempt: int) -> int:
        """Return the id of the sample that replaces a damaged sample; attempts count from 0.

        The substitute is another sample (if there is another) of about the same window, so that it lies in shards that
        are being read anyway.
        """
        position %= self.samples
        reach = min(max(self.window, _FEWEST_SUBSTITUTES), self.samples)
        first = min(position // self.window * self.window, self.samples - reach)
        distance = 1 + _below(reach - 1, self.seed, _SUBSTITUTE_STREAM, (attempt, position, epoch))
        wanted = self.sample(epoch, position)
        for step in range(reach):  # more than one step only where the drawn place repeats the sample itself
            other = self.sample(epoch, first + (position - first + distance + step) % reach)
            if other != wanted:
                return other
        return wanted

    def _window(self, epoch: int, window: int) -> Visits:
        return _recall(self._windows, (epoch, window), lambda: self._fill_window(epoch, window))

    def _fill_window(self, epoch: int, window: int) -> Visits:
        first = window * self.window
        end = min(first + self.window, self.samples)
        stretches = [
            self._stretch(epoch, source, start, stop)
            for source, (start, stop) in enumerate(zip(self._shares(first), self._shares(end), strict=True))
        ]
        order = _permutation(self.seed, _WINDOW_STREAM, (0, window, epoch), end - first)
        return Visits(*(np.concatenate(fields)[order] for fields in zip(*stretches, strict=True)))

    def _shares(self, position: int) -> Iterator[int]:
        """Say how many of an epoch's first `position` visits are each source's, in proportion to its visits.

        Each source takes its share, rounded down, of the visits that the sources before it left. So no share shrinks as
        the position grows, every share ends at its source's visits, and each is off by less than the number of sources.
        """
        left, total = position, self.samples
        for visits in self._visits:
            share = left * visits // total
            yield share
            left, total = left - share, total - visits

    def _stretch(self, epoch: int, source: int, start: int, stop: int) -> Visits:
        """Visits `start` to `stop` of one source's stream."""
        stream = _recall(self._streams, epoch, lambda: self._lay_out(epoch))[source]
        places = np.arange(start, stop)
        rows = np.searchsorted(stream.ends, places, side="right")  # "right" steps over shards without samples
        shards, passes = stream.shards[rows], stream.passes[rows]
        places -= stream.starts[rows]
        in_part = passes == self._visits[source] // int(self._counts[source].sum())
        for row in np.unique(rows[in_part]).tolist():
            shard = int(stream.shards[row])
            shuffled = _permutation(self.seed, _PART_STREAM, (shard, source, epoch), int(self._counts[source][shard]))
            chosen = np.sort(shuffled[: stream.ends[row] - stream.starts[row]])  # sorted: read front to back
            here = rows == row
            places[here] = chosen[places[here]]
        return Visits(self._first_ids[source][shards] + places, passes)

    def _lay_out(self, epoch: int) -> list[_Stream]:
        return [self._lay_out_source(epoch, source) for source in range(len(self._counts))]

    def _lay_out_source(self, epoch: int, source: int) -> _Stream:
        counts = self._counts[source]
        whole, part = divmod(self._visits[source], int(counts.sum()))
        orders = [
            _permutation(self.seed, _SHARD_STREAM, (turn, source, epoch), len(counts))
            for turn in range(whole + (part > 0))
        ]
        lengths = [counts[order] for order in orders[:whole]]
        if part:
            offset = _below(int(counts.sum()), self.seed, _ROUNDING_STREAM, (0, source, epoch))
            lengths.append(_split(part, counts, offset)[orders[-1]])
        ends = np.cumsum(np.concatenate(lengths))
        passes = np.repeat(np.arange(len(orders)), len(counts))
        return _Stream(np.concatenate(orders), passes, ends - np.concatenate(lengths), ends)


def steps_per_epoch(samples: int, config: RunConfig) -> int:
    """Return the steps of an epoch of `samples` visits.

    With data.last_batch: pad, and where train.epoch_steps_multiple rounds the steps up, positions past the epoch's end
    stand for its first samples again.
    Raises: UserError where not one step is left.
    """
    global_batch = config.train.global_batch
    steps = samples // global_batch if config.data.last_batch == "drop" else -(-samples // global_batch)
    if steps == 0:
        raise UserError(
            f"train.global_batch is {global_batch}, but the data has {counted(samples, 'sample')}: "
            "with data.last_batch: drop an epoch must hold at least one batch"
        )
    multiple = config.train.epoch_steps_multiple
    return -(-steps // multiple) * multiple


def _split(part: int, counts: Positions, offset: int) -> Positions:
    """Split `part` samples over shards in proportion to their counts, each share rounded up or down.

    offset: 0 .. samples - 1 decides between up and down; over all offsets each share averages to the exact proportion.
    """
    total = int(counts.sum())
    shares, remainders = np.divmod(counts * part, total)
    carried = (np.cumsum(remainders) + offset) // total
    return np.asarray(shares + np.diff(carried, prepend=0))


def _draws(seed: int, stream: int, place: tuple[int, int, int], count: int) -> NDArray[np.uint64]:
    """Draw 64-bit numbers as a function of (seed, stream, place); the first counter word counts them."""
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    counter = np.array([0, *place], dtype=np.uint64)
    return np.asarray(np.random.Philox(key=key, counter=counter).random_raw(count))


def _below(limit: int, seed: int, stream: int, place: tuple[int, int, int]) -> int:
    """Draw an integer from 0 to limit - 1; 0 where limit is 0."""
    return int(_draws(seed, stream, place, 1)[0]) * limit >> 64


def _permutation(seed: int, stream: int, place: tuple[int, int, int], length: int) -> Positions:
    return np.argsort(_draws(seed, stream, place, length), kind="stable")


def _recall(kept: "OrderedDict[_Key, _Made]", key: _Key, make: Callable[[], _Made]) -> _Made:
    """Return kept[key], which is made where it is missing; of more than a few the least recently used is dropped."""
    if key not in kept:
        kept[key] = make()
        if len(kept) > _KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
