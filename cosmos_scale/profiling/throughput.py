"""What the steps between two records did: their operations, as a share of the peak too, and the memory they took."""

import math
import resource
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cosmos_scale.batch import Batch
from cosmos_scale.config import RunConfig
from cosmos_scale.profiling.chips import peak_flops
from cosmos_scale.profiling.executed import executed_flops
from cosmos_scale.profiling.flops import loss_flops, step_flops, student_flops, teacher_flops

GIB = 2.0**30
MOST_KEPT = 64
"""Steps whose captions' lengths are kept before they are counted."""


class RankWork(NamedTuple):
    """What one rank did in a record's steps.

    needed, executed: operations, as `flops.py` and `executed.py` count them. peak: the device's operations a second in
    the run's precision; nan where not known. memory: bytes, see `peak_memory`.
    """

    needed: float
    executed: float
    peak: float
    memory: int


class StepCounter:
    """Adds up a rank's operations, from the lengths of captions that the host has: the device is not waited for.

    Lengths of several steps are counted at once, since operations are sums over segments. What is executed beyond need
    hangs on how a batch is packed: its share is that of the last step counted.
    """

    def __init__(self, config: RunConfig, device: torch.device, world_size: int) -> None:
        self._config, self._device, self._world_size = config, device, world_size
        self._peak = peak_flops(device, config.precision)
        self._lengths: list[Tensor] = []  # [K, B] of each step not counted yet
        self._needed = 0
        self._last: Batch | None = None

    def note(self, batch: Batch) -> None:
        """Note a step's batch, this rank's share; it may lie on any device."""
        lengths_KB = batch.caption_lengths.clone()  # the loader writes its next batch to the same memory
        self._last = _without_contents(batch, lengths_KB)
        self._lengths.append(lengths_KB)
        if len(self._lengths) >= MOST_KEPT:
            self._count()

    def take(self) -> RankWork:
        """Return what the steps noted since the last call did."""
        self._count()
        needed, self._needed = self._needed, 0
        share = 1.0
        if self._last is not None:
            executed = executed_flops(self._last, self._config, self._device, self._world_size)
            share = executed / step_flops(self._last, self._config, self._world_size)
        peak = math.nan if self._peak is None else self._peak
        return RankWork(needed, needed * share, peak, peak_memory(self._device))

    def _count(self) -> None:
        if not self._lengths or self._last is None:
            return
        steps = len(self._lengths)
        joined = _without_contents(self._last, torch.cat(self._lengths, dim=1))
        towers = student_flops(joined, self._config) + teacher_flops(joined, self._config)
        self._needed += towers + steps * loss_flops(self._last, self._config, self._world_size)
        self._lengths.clear()


def throughput(work: Sequence[RankWork], seconds: float, samples: int) -> dict[str, float]:
    """Return a record's numbers from what all ranks did in so many seconds, for so many samples of the global batch.

    A rank has one GPU, or computes on a CPU. mfu and hfu, the shares of the peak that needed and executed operations
    reached, stand in it only where all peaks are known.
    """
    ranks, peak = len(work), sum(rank.peak for rank in work)
    needed, executed = sum(rank.needed for rank in work) / seconds, sum(rank.executed for rank in work) / seconds
    numbers = {
        "samples_per_second": samples / seconds,
        "samples_per_second_per_rank": samples / seconds / ranks,
        "tflops_per_rank": needed / ranks / 1e12,
        "executed_tflops_per_rank": executed / ranks / 1e12,
        "peak_memory_gib": max(rank.memory for rank in work) / GIB,
    }
    return numbers if math.isnan(peak) else numbers | {"mfu": needed / peak, "hfu": executed / peak}


def peak_memory(device: torch.device) -> int:
    """Return the most bytes so far that torch has reserved on a GPU, or on a CPU those of the process in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _without_contents(batch: Batch, lengths_KB: Tensor) -> Batch:
    """Return a batch of as many samples as there are lengths, whose other tensors have shapes and no memory."""
    samples = lengths_KB.shape[1]

    def shaped(tensor: Tensor) -> Tensor:
        return torch.empty((tensor.shape[0], samples, *tensor.shape[2:]), dtype=tensor.dtype, device="meta")

    return Batch(
        shaped(batch.global_crops),
        shaped(batch.local_crops),
        shaped(batch.captions),
        lengths_KB,
        torch.empty(samples, dtype=torch.int64, device="meta"),
        batch.substituted,
    )
