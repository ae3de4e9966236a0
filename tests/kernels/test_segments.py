"""Which segments SDPA takes together, and which lengths are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_scale.kernels.segments import MOST_PADDING, Segments


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 80), st.integers(1, 80)), max_size=30))
def test_groups_cover_the_segments_in_order_with_little_padding(lengths: list[tuple[int, int]]) -> None:
    segments = Segments([queries for queries, _ in lengths], [keys for _, keys in lengths])
    place = 0
    for group in segments.groups:
        assert group.first == place
        own = lengths[place : place + group.size]
        place += group.size
        assert (group.queries, group.keys) == (max(pair[0] for pair in own), max(pair[1] for pair in own))
        assert group.even_queries == (len({pair[0] for pair in own}) == 1)
        assert group.even_keys == (len({pair[1] for pair in own}) == 1)
        padded = group.size * (group.queries + group.keys)
        assert padded <= (1 + MOST_PADDING) * sum(map(sum, own))
    assert place == len(lengths)


def test_sorted_captions_come_to_few_groups() -> None:
    lengths = sorted(torch.randint(8, 76, (512,), generator=torch.Generator().manual_seed(0)).tolist(), reverse=True)
    assert len(Segments(lengths).groups) <= 8


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 of queries, but 1 of keys"):
        Segments([1, 2], [3])
    with pytest.raises(ValueError, match="segment 1: 2 queries have no key"):
        Segments([1, 2], [3, 0])
    with pytest.raises(ValueError, match="segment 0: lengths -1 and 3"):
        Segments([-1], [3])
