"""Ranks as threads of one process: quick to start, with gathers that meet at a barrier."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from cosmos_scale.evaluation.evaluator import Gather

Result = TypeVar("Result")

SECONDS = 60.0  # that a gather waits for the slowest rank


def in_threads(world_size: int, run_rank: Callable[[int, Gather], Result]) -> list[Result]:
    """Run every rank in a thread of its own, and return what each returns, by rank.

    A gather in which a rank is missing ends the test, not a hang; unequal shapes and dtypes are refused.
    """
    barrier = threading.Barrier(world_size, timeout=SECONDS)
    parts: list[Tensor] = [torch.empty(0)] * world_size
    results: dict[int, Result] = {}

    def gather_of(rank: int) -> Gather:
        def gather(tensor: Tensor) -> Tensor:
            parts[rank] = tensor
            barrier.wait()
            assert len({(part.shape, part.dtype) for part in parts}) == 1
            joined = torch.cat(parts)
            barrier.wait()
            return joined

        return gather

    def run(rank: int) -> None:
        results[rank] = run_rank(rank, gather_of(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(world_size)]
