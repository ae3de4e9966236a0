"""The segments of packed tokens: their lengths, which live on the host, and what attention derives from them.

A segment is one view. No back end waits for the device to learn the lengths.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cosmos_scale.kernels.serving import stands_for_gpu

# The most padding in one of SDPA's batches, as a share of the batch's tokens. Less padding would need more calls: a
# call takes some 0.1 ms on a CPU, and attention over the padding takes far less.
MOST_PADDING = 0.25


MOST_RUNS = 4
"""The most runs of equally long segments that dense attention takes: each of them is a call."""


class Group(NamedTuple):
    """Neighbouring segments that SDPA takes as one batch, padded to the longest: `size` segments from `first` on.

    queries, keys: tokens of the longest segment. even_queries, even_keys: whether all segments have as many, so that
    none is padded.
    """

    first: int
    size: int
    queries: int
    keys: int
    even_queries: bool
    even_keys: bool


class Segments:
    """The lengths of the segments in packed queries and keys, and what back ends derive from them, made once.

    queries, keys: how many tokens each segment has, in packed order. keys is None where queries and keys belong to the
    same tokens (self-attention). A segment may be empty, but a segment with queries needs keys. Raises ValueError for
    other lengths.
    """

    def __init__(self, queries: Sequence[int], keys: Sequence[int] | None = None) -> None:
        self.queries = tuple(queries)
        self.keys = self.queries if keys is None else tuple(keys)
        if len(self.queries) != len(self.keys):
            raise ValueError(f"segments: {len(self.queries)} of queries, but {len(self.keys)} of keys")
        for number, (query_count, key_count) in enumerate(zip(self.queries, self.keys, strict=True)):
            if query_count < 0 or key_count < 0:
                raise ValueError(f"segment {number}: lengths {query_count} and {key_count} must not be negative")
            if query_count and not key_count:
                raise ValueError(f"segment {number}: {query_count} queries have no key to attend to")
        self.query_tokens, self.key_tokens = sum(self.queries), sum(self.keys)
        self._cu_seqlens: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._padding: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
        self._kept: dict[tuple[object, ...], Any] = {}

    @cached_property
    def longest_queries(self) -> int:
        """The most queries of a segment."""
        return max(self.queries, default=0)

    @cached_property
    def longest_keys(self) -> int:
        """The most keys of a segment."""
        return max(self.keys, default=0)

    def cu_seqlens(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the segments' starts and the last segment's end, in queries and in keys: [segments + 1] int32 each."""
        if device not in self._cu_seqlens:
            queries = keys = to_device(_ends(self.queries), device)
            if self.keys != self.queries:
                keys = to_device(_ends(self.keys), device)
            self._cu_seqlens[device] = queries, keys
        return self._cu_seqlens[device]

    @cached_property
    def runs(self) -> list[Group]:
        """Runs of equally long segments, in packed order: batches without padding."""
        lengths = zip(self.queries, self.keys, strict=True)
        runs: list[Group] = []
        for (queries, keys), run in itertools.groupby(lengths):
            first = runs[-1].first + runs[-1].size if runs else 0
            runs.append(Group(first, sum(1 for _ in run), queries, keys, True, True))
        return runs

    @cached_property
    def is_even(self) -> bool:
        """Whether the segments are equally long but for a few changes, as the crops of two sizes are."""
        return len(self.runs) <= MOST_RUNS

    @cached_property
    def groups(self) -> list[Group]:
        """SDPA's batches, in packed order: runs of equally long segments, several together where padding is little.

        So sorted segments form few groups, whatever their lengths. Segments without queries join no other run: padding
        would give them queries, and a query must find a key.
        """
        groups: list[Group] = []
        tokens = 0  # queries and keys of the last group, without padding
        for run in self.runs:
            count, queries, keys = run.size, run.queries, run.keys
            own_tokens = count * (queries + keys)
            if groups and queries and groups[-1].queries:
                last = groups[-1]
                merged = Group(
                    last.first,
                    last.size + count,
                    max(last.queries, queries),
                    max(last.keys, keys),
                    last.even_queries and last.queries == queries,
                    last.even_keys and last.keys == keys,
                )
                if merged.size * (merged.queries + merged.keys) <= (1 + MOST_PADDING) * (tokens + own_tokens):
                    groups[-1] = merged
                    tokens += own_tokens
                    continue
            groups.append(run)
            tokens = own_tokens
        return groups

    def kept(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """Return what a back end derives from the lengths: made at the first call with a key, and kept."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def padding(self, lengths: tuple[int, ...], longest: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return where tokens lie in segments padded to `longest`: rows [T] int64, mask [segments, longest] bool."""
        key = (lengths, longest, device)
        if key not in self._padding:
            mask = np.arange(longest) < np.array(lengths)[:, None]
            self._padding[key] = to_device(mask.ravel().nonzero()[0], device), to_device(mask, device)
        return self._padding[key]


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device; to CUDA from pinned memory, so that the host does not wait for the copy.

    A tensor on the CPU that stands for a GPU's is a copy too: where steps are counted, so is what it costs a GPU.
    """
    # Outside inference mode, even where the first caller is inside it: the tensor is kept for later backward passes.
    with torch.inference_mode(False):
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor.to(device, copy=stands_for_gpu(device))


def _ends(lengths: tuple[int, ...]) -> npt.NDArray[np.int32]:
    return np.array([0, *itertools.accumulate(lengths)], dtype=np.int32)
