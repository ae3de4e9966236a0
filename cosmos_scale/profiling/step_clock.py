"""The times of a step's phases, on the host and on the device, taken without a wait for the device.

Every entry into a phase, and every way out of one, is a mark: the host's clock, and on a GPU an event in the current
stream. Between two marks lies an interval, which belongs to the innermost phase there. So the intervals of a step
cover it without gap or overlap. What lies in no phase is "rest".

An interval of the stream ends when the stream has done what it was asked before the mark, and no earlier than the mark.
So a device interval holds the work of its phase, what the stream waited for in it, and the time in which the device had
nothing to do since the host was late.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch

from cosmos_scale.phases import STEP_PHASES, listening

REST = "rest"
TRIES, TRIED = 20, 100  # phases, to know the time of a mark; the fastest try is the least disturbed


class StepTimes(NamedTuple):
    """One step, in milliseconds.

    host_ms: of the whole step. host, device: by phase; a part of a phase has the key PHASE/PART, and is also counted in
    its phase. On a CPU both are the same.
    """

    host_ms: float
    host: dict[str, float]
    device: dict[str, float]

    @property
    def device_ms(self) -> float:
        """The whole step on the device."""
        return sum(ms for key, ms in self.device.items() if "/" not in key)


class _Mark(NamedTuple):
    """The begin of an interval. key: the phase that it belongs to, or PHASE/PART."""

    key: str
    host: float
    event: torch.cuda.Event | None


class StepClock:
    """Listens to the phases of steps, and measures the steps that it is given."""

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._inside: list[str] = []
        self._marks: list[_Mark] = []
        self._steps: list[list[_Mark]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note the begin and the end of a phase."""
        inside = self._inside
        own = name in STEP_PHASES or len(inside) == 1
        inside.append(name if own else f"{inside[-1].partition('/')[0]}/{name}")
        self._mark()
        try:
            yield
        finally:
            inside.pop()
            self._mark()

    def measure(self, take: Callable[[], object]) -> None:
        """Take a step and note its times."""
        self._inside, self._marks = [REST], []
        self._mark()
        with listening(self):
            take()
        self._mark()
        self._steps.append(self._marks)

    def steps(self) -> list[StepTimes]:
        """Return the times of the steps so far; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return [_times(marks) for marks in self._steps]

    def marks_ms(self) -> float:
        """Return what the marks of a step take of the host: the median of the steps, by the time of a mark now."""
        marks = sorted(len(marks) for marks in self._steps)
        times = []
        for _ in range(TRIES):
            self._inside, self._marks = [REST], []
            start = time.perf_counter()
            for _ in range(TRIED):
                with self.phase(STEP_PHASES[0]):  # two marks
                    pass
            times.append(time.perf_counter() - start)
        return 1e3 * min(times) / (2 * TRIED) * marks[len(marks) // 2]

    def _mark(self) -> None:
        event = None
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append(_Mark(self._inside[-1], time.perf_counter(), event))


def _times(marks: list[_Mark]) -> StepTimes:
    host: dict[str, float] = {}
    device: dict[str, float] = {}
    for mark, end in pairwise(marks):
        host_ms = device_ms = 1e3 * (end.host - mark.host)
        if mark.event is not None and end.event is not None:
            device_ms = float(mark.event.elapsed_time(end.event))
        for key in {mark.key, mark.key.partition("/")[0]}:
            host[key] = host.get(key, 0.0) + host_ms
            device[key] = device.get(key, 0.0) + device_ms
    return StepTimes(1e3 * (marks[-1].host - marks[0].host), host, device)
