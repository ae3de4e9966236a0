"""The teacher's weights, and how the average gets into them: a class for each way that `engine.zero` lays them out."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from cosmos_scale.batch import Batch, TeacherFeatures
from cosmos_scale.loss.gather import all_gather_flat


class TeacherWeights:
    """The teacher's weights in compute precision. In this class they are the average itself: nothing is to be copied.

    forward: returns the features of a batch's global views; collective at stage 3.
    """

    def __init__(self, forward: Callable[[Batch], TeacherFeatures]) -> None:
        self.forward = forward

    def refresh(self, *, copied: bool) -> None:
        """Start to copy the average into the weights; copied: whether the update has written the copies."""

    def wait(self) -> None:
        """Wait until the last refresh is done."""

    def whole(self) -> AbstractContextManager[None]:
        """Hold whole weights on every rank. Collective."""
        return nullcontext()


class CopiedTeacher(TeacherWeights):
    """Weights that are copies of averages of the same elements: a copy for each tensor of averages."""

    def __init__(
        self, forward: Callable[[Batch], TeacherFeatures], copies: list[Tensor], averages: list[Tensor]
    ) -> None:
        super().__init__(forward)
        self._copies, self._averages = copies, averages

    @override
    def refresh(self, *, copied: bool) -> None:
        if not copied:
            torch._foreach_copy_(self._copies, self._averages)


class GatheredTeacher(CopiedTeacher):
    """Flat whole weights, in which each rank's part is a copy; one all-gather a group brings the other ranks' parts.

    The update may write this rank's part: between a refresh and the next update the teacher is used, and then waits.
    """

    def __init__(
        self, forward: Callable[[Batch], TeacherFeatures], flats: list[Tensor], averages: list[Tensor], rank: int
    ) -> None:
        self.parts = [
            flat.narrow(0, rank * average.numel(), average.numel())
            for flat, average in zip(flats, averages, strict=True)
        ]
        super().__init__(forward, self.parts, averages)
        self._flats = flats
        self._gathering: list[Any] = []

    @override
    def refresh(self, *, copied: bool) -> None:
        self.wait()
        super().refresh(copied=copied)
        for flat, part in zip(self._flats, self.parts, strict=True):
            self._gathering.append(all_gather_flat(flat, part, async_op=True))

    @override
    def wait(self) -> None:
        for work in self._gathering:
            work.wait()
        self._gathering.clear()


class ShardedTeacher(CopiedTeacher):
    """This rank's parts of the weights, written where DeepSpeed keeps them, so that its next gathering reads them."""

    def __init__(
        self,
        forward: Callable[[Batch], TeacherFeatures],
        copies: list[Tensor],
        averages: list[Tensor],
        gathered: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """gathered: returns a context that holds the whole weights on every rank."""
        super().__init__(forward, copies, averages)
        self._gathered = gathered
        self._written: torch.cuda.Event | None = None

    @override
    def refresh(self, *, copied: bool) -> None:
        super().refresh(copied=copied)
        if any(copy.is_cuda for copy in self._copies):
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
