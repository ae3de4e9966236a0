"""The order of the data: a permutation of every epoch, a pure function of (seed, epoch, position)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cosmos_scale.data.order import EpochOrder, SourceShards, steps_per_epoch
from cosmos_scale.errors import UserError

shard_counts = st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any)
seeds = st.integers(0, 2**63)
UNTIMED = settings(deadline=None)  # tests share cores: how long one example takes says nothing


def ids_of(counts: list[int], seed: int, window: int, epoch: int) -> list[int]:
    order = EpochOrder([SourceShards(np.array(counts))], seed, window)
    ids: list[int] = order.sample_ids(epoch, np.arange(sum(counts))).tolist()
    return ids


@UNTIMED
@given(shard_counts, seeds, st.integers(1, 200), st.integers(0, 40))
def test_an_epoch_visits_every_sample_exactly_once(counts: list[int], seed: int, window: int, epoch: int) -> None:
    assert sorted(ids_of(counts, seed, window, epoch)) == list(range(sum(counts)))


@UNTIMED
@given(shard_counts, seeds, st.integers(1, 50), st.integers(0, 5), st.data())
def test_a_position_depends_on_nothing_that_was_asked_before(
    counts: list[int], seed: int, window: int, epoch: int, data: st.DataObject
) -> None:
    whole = ids_of(counts, seed, window, epoch)
    order = EpochOrder([SourceShards(np.array(counts))], seed, window)
    for place in data.draw(st.lists(st.integers(0, sum(counts) - 1), max_size=20)):
        order.sample(data.draw(st.integers(0, 9)), place)  # other epochs and places in between
        assert order.sample(epoch, place) == whole[place]


@UNTIMED
@given(shard_counts, st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.sampled_from(["drop", "pad"]))
def test_ranks_in_a_row_are_the_same_batch_at_every_world_size(
    counts: list[int], window: int, world_size: int, micro_batch: int, last_batch: str
) -> None:
    samples, global_batch = sum(counts), world_size * micro_batch
    if last_batch == "drop" and global_batch > samples:
        return
    whole = ids_of(counts, 3, window, 1)
    steps = steps_per_epoch(samples, global_batch, last_batch, 1)
    seen: list[int] = []
    for step in range(steps):
        for rank in range(world_size):  # every rank with an order of its own, as after a restart
            first = step * global_batch + rank * micro_batch
            order = EpochOrder([SourceShards(np.array(counts))], 3, window)
            seen += order.sample_ids(1, np.arange(first, first + micro_batch)).tolist()
    assert len(seen) == steps * global_batch
    if last_batch == "drop":
        assert seen == whole[: len(seen)]
        assert samples - len(seen) < global_batch
    else:
        assert seen == (whole * (global_batch + 1))[: len(seen)]  # filled with the epoch's first samples
        assert len(seen) - samples < global_batch


@UNTIMED
@given(shard_counts, st.integers(1, 40), st.integers(0, 3))
def test_windows_read_few_shards_each_shard_once(counts: list[int], window: int, epoch: int) -> None:
    shard_of = np.repeat(np.arange(len(counts)), counts)
    ids = ids_of(counts, 5, window, epoch)
    shards_of_windows = [set(shard_of[ids[first : first + window]]) for first in range(0, len(ids), window)]
    for shard in range(len(counts)):
        at = [number for number, shards in enumerate(shards_of_windows) if shard in shards]
        assert at == list(range(at[0], at[-1] + 1)) if at else counts[shard] == 0
    # A shard lies in at most the windows that its stretch of the stream cuts; so shards plus windows bound all visits.
    assert sum(map(len, shards_of_windows)) <= len(counts) + len(shards_of_windows)


def test_seeds_and_epochs_differ() -> None:
    counts = [50] * 8
    orders = {tuple(ids_of(counts, seed, 100, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_every_place_of_a_window_is_equally_likely() -> None:
    """Chi-square over 3,000 epochs of 6 samples: the sample at each position is uniform (limit: p < 1e-4 fails)."""
    order = EpochOrder([SourceShards(np.array([2, 3, 1]))], 7, 6)
    ids = np.array([order.sample_ids(epoch, np.arange(6)) for epoch in range(3000)])
    for position in range(6):
        assert stats.chisquare(np.bincount(ids[:, position], minlength=6)).pvalue > 1e-4


def test_the_order_never_changes() -> None:
    """Runs are resumed across versions: these ids were computed once and must stay."""
    assert ids_of([4, 3, 5], 1, 6, 2) == [0, 8, 2, 1, 3, 7, 5, 10, 6, 9, 4, 11]


@UNTIMED
@given(shard_counts, st.integers(1, 40), st.integers(0, 3), st.data())
def test_a_substitute_is_another_sample_and_a_pure_function(
    counts: list[int], window: int, epoch: int, data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, sum(counts) - 1))
    attempt = data.draw(st.integers(0, 20))
    substitute = EpochOrder([SourceShards(np.array(counts))], 1, window).substitute(epoch, position, attempt)
    used = EpochOrder([SourceShards(np.array(counts))], 1, window)
    used.substitute(epoch + 1, position, attempt + 1)
    assert used.substitute(epoch, position, attempt) == substitute
    assert 0 <= substitute < sum(counts)
    assert substitute != used.sample(epoch, position) or sum(counts) == 1


def test_a_substitute_comes_from_shards_that_are_being_read() -> None:
    order = EpochOrder([SourceShards(np.full(40, 500))], 1, 2000)
    for position in (0, 1999, 2000, 9_999, 19_999):
        window = order.sample_ids(0, np.arange(position // 2000 * 2000, position // 2000 * 2000 + 2000))
        assert {order.substitute(0, position, attempt) for attempt in range(20)} <= set(window.tolist())


def test_substitutes_differ_between_attempts() -> None:
    order = EpochOrder([SourceShards(np.array([1000]))], 1, 1000)
    assert len({order.substitute(0, 3, attempt) for attempt in range(20)}) > 15


def test_seeking_in_thirty_million_samples_reads_no_samples() -> None:
    """90 % into an epoch of 6,388 shards: milliseconds, where a pass over samples would take minutes."""
    counts = np.full(6388, 30_000_000 // 6388 + 1)
    order = EpochOrder([SourceShards(counts)], 0, 65536)
    position = int(0.9 * counts.sum())
    ids = order.sample_ids(3, np.arange(position, position + 4096))
    assert len(set(ids.tolist())) == 4096
    assert len(np.unique(ids // counts[0])) <= 2 * (65536 // counts[0] + 2)


@pytest.mark.parametrize(
    ("samples", "batch", "last_batch", "multiple", "steps"),
    [
        (100, 10, "drop", 1, 10),
        (109, 10, "drop", 1, 10),
        (109, 10, "pad", 1, 11),
        (5, 10, "pad", 1, 1),
        # The published runs (samples, global batch, steps): ceil(ceil(N / batch) / 16) x 16.
        (2_823_019, 1024, "pad", 16, 2768),
        (10_010_225, 4096, "pad", 16, 2448),
        (14_065_827, 4096, "pad", 16, 3440),
        (26_899_071, 4096, "pad", 16, 6576),
        (15_037_386, 4096, "pad", 16, 3680),
    ],
)
def test_steps_per_epoch(samples: int, batch: int, last_batch: str, multiple: int, steps: int) -> None:
    assert steps_per_epoch(samples, batch, last_batch, multiple) == steps


def test_an_epoch_without_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.global_batch is 10, but the data has 9 samples"):
        steps_per_epoch(9, 10, "drop", 1)
