"""The teacher's weights, and how the average gets into them: a class for each way that `engine.zero` lays them out."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from cosmos_scale.batch import Batch, TeacherFeatures
from cosmos_scale.fragments import Fragment
from cosmos_scale.loss.gather import all_gather_flat


class TeacherWeights:
    """The teacher's weights in compute precision. In this class they are the average itself: nothing is to be copied.

    forward: returns the features of a batch's global views; collective at stage 3.
    """

    def __init__(self, forward: Callable[[Batch], TeacherFeatures]) -> None:
        self.forward = forward

    def refresh(self) -> None:
        """Start to copy the average into the weights."""

    def wait(self) -> None:
        """Wait until the last refresh is done."""

    def whole(self) -> AbstractContextManager[None]:
        """Hold whole weights on every rank. Collective."""
        return nullcontext()


class CopiedTeacher(TeacherWeights):
    """Weights that are copied from averages of the same elements."""

    def __init__(
        self, forward: Callable[[Batch], TeacherFeatures], weights: list[Tensor], fragments: Sequence[Fragment]
    ) -> None:
        super().__init__(forward)
        self._weights = weights
        self._averages = [fragment.ema for fragment in fragments]

    @override
    def refresh(self) -> None:
        torch._foreach_copy_(self._weights, self._averages)


class GatheredTeacher(TeacherWeights):
    """Flat whole weights, gathered from the ranks' shards of the average by one all-gather a group."""

    def __init__(
        self, forward: Callable[[Batch], TeacherFeatures], flats: list[Tensor], averages: list[Tensor]
    ) -> None:
        super().__init__(forward)
        self._flats, self._averages = flats, averages
        self._gathering: list[tuple[Any, Tensor]] = []

    @override
    def refresh(self) -> None:
        self.wait()
        for flat, average in zip(self._flats, self._averages, strict=True):
            shard = average.to(flat)
            self._gathering.append((all_gather_flat(flat, shard, async_op=True), shard))

    @override
    def wait(self) -> None:
        for work, _ in self._gathering:  # the list keeps each shard until the all-gather that reads it is done
            work.wait()
        self._gathering.clear()


class ShardedTeacher(CopiedTeacher):
    """This rank's parts of the weights, written where DeepSpeed keeps them, so that its next gathering reads them."""

    def __init__(
        self,
        forward: Callable[[Batch], TeacherFeatures],
        weights: list[Tensor],
        fragments: Sequence[Fragment],
        gathered: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """gathered: returns a context that holds the whole weights on every rank."""
        super().__init__(forward, weights, fragments)
        self._gathered = gathered
        self._written: torch.cuda.Event | None = None

    @override
    def refresh(self) -> None:
        super().refresh()
        if any(weight.is_cuda for weight in self._weights):
            # DeepSpeed (0.19) gathers in a stream of its own, which does not wait for what other streams write.
            self._written = torch.cuda.Event()
            self._written.record()

    @override
    def wait(self) -> None:
        if self._written is not None:  # the host hardly waits: the student's forward comes between
            self._written.synchronize()
            self._written = None

    @override
    def whole(self) -> AbstractContextManager[None]:
        return self._gathered()
