"""How long collectives take between the ranks that are there, by the size of their messages."""

import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_scale.engine.ranks import Ranks

MESSAGES = tuple(2**power for power in range(12, 28, 3))
"""Bytes of the largest tensor: 4 KiB to 128 MiB."""
REPEATS = 5


def exchange_times(ranks: Ranks) -> Iterator[tuple[str, int, int, float]]:
    """Yield of each kind and size the kind, the ranks, the bytes, and the seconds of one, alone. Collective.

    Yields nothing where there is one rank.
    """
    if ranks.world_size == 1:
        return
    for nbytes in MESSAGES:
        elements = nbytes // 4 // ranks.world_size * ranks.world_size
        whole = torch.zeros(elements, device=ranks.device)
        share = torch.zeros(elements // ranks.world_size, device=ranks.device)
        yield "all_reduce", ranks.world_size, 4 * elements, _seconds(lambda: dist.all_reduce(whole), ranks)  # noqa: B023
        yield (
            "all_gather",
            ranks.world_size,
            4 * elements,
            _seconds(lambda: dist.all_gather_into_tensor(whole, share), ranks),  # noqa: B023
        )
        yield (
            "reduce_scatter",
            ranks.world_size,
            4 * elements,
            _seconds(lambda: dist.reduce_scatter_tensor(share, whole), ranks),  # noqa: B023
        )


def _seconds(collective: Callable[[], object], ranks: Ranks) -> float:
    """Return the median time of a collective; the slowest rank's counts, since all of them wait for it."""
    found = []
    for _ in range(REPEATS):
        dist.barrier(ranks.control)
        _wait(ranks.device)
        started = time.perf_counter()
        collective()
        _wait(ranks.device)
        found.append(time.perf_counter() - started)
    slowest = Tensor([statistics.median(found)])
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=ranks.control)
    return slowest.item()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
