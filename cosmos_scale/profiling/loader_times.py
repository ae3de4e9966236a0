"""What the loader takes for a sample, part by part, measured in this process by one thread."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from cosmos_scale.phases import SAMPLE_PARTS, listening
from cosmos_scale.profiling.step_clock import REST

SECONDS = 1.0  # batches are made for so long


class LoaderTimes(NamedTuple):
    """Milliseconds of one core for a sample: all, and by part; what is in no part is "rest"."""

    ms_per_sample: float
    parts: dict[str, float]

    def cores_needed(self, samples: int, step_ms: float) -> float:
        """Return how many cores make so many samples in the time of a step."""
        return self.ms_per_sample * samples / step_ms


class _PartClock:
    """Adds up the time of each part; parts do not lie in each other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def time_loader(make_batch: Callable[[int], object], samples: int) -> LoaderTimes:
    """Make batches, of so many samples each, and time them. make_batch: is given the numbers 0, 1, ..."""
    clock, threads, batches = _PartClock(), torch.get_num_threads(), 0
    torch.set_num_threads(1)  # as in a loader process
    try:
        make_batch(0)  # opens files
        start = time.perf_counter()
        with listening(clock):
            while batches == 0 or time.perf_counter() < start + SECONDS:
                batches += 1
                make_batch(batches)
        whole = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    clock.seconds[REST] = whole - sum(clock.seconds.values())
    each = 1e3 / (batches * samples)
    parts = {name: each * clock.seconds[name] for name in (*SAMPLE_PARTS, REST) if name in clock.seconds}
    return LoaderTimes(each * whole, parts)
