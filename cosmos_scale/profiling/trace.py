"""A trace of torch's profiler (Kineto's Chrome format), read: which work ran in which phase of which step.

Steps and phases are the annotations `phase:NAME` of the thread that trains, `phase:step` around each step. A kernel
belongs to the phase in which the host launched it: kernel and launch have the same correlation number. The host's
operators belong to the phase in which they begin. In the file, times are microseconds.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cosmos_scale.phases import STEP_PHASES
from cosmos_scale.profiling.step_clock import REST

PREFIX, STEP = "phase:", "step"
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
OUTSIDE = -1  # the number of no step

TraceEvent = Mapping[str, Any]
Stretch = tuple[float, float]  # from, to


class TracedWork(NamedTuple):
    """A kernel, a copy or an operator: microseconds of its begin and end. phase, step: where it was launched.

    lane: the stream, or the host's thread. self_time: without what it calls itself.
    """

    name: str
    start: float
    end: float
    phase: str
    step: int
    lane: int
    details: Mapping[str, Any]
    self_time: float


class Trace:
    """What a trace says of its steps. skip: the first steps, which are left out: the profiler warms up in them."""

    def __init__(self, events: Iterable[TraceEvent], *, skip: int = 0) -> None:
        self.events = [event for event in events if "ts" in event]
        annotated = [event for event in self.events if event.get("cat") == "user_annotation"]
        phases = [event for event in annotated if event["name"].startswith(PREFIX)]
        whole = sorted(stretch_of(event) for event in phases if event["name"] == PREFIX + STEP)
        self.steps = whole[skip:]
        self.main_thread = next((event["tid"] for event in phases if event["name"] == PREFIX + STEP), 0)
        names = {PREFIX + name for name in STEP_PHASES}
        own = [event for event in phases if event["tid"] == self.main_thread and event["name"] in names]
        self.phase_stretches = sorted((*stretch_of(event), event["name"].removeprefix(PREFIX)) for event in own)
        self._starts = [start for start, _ in self.steps]
        self._times, self._names = _innermost(self.phase_stretches)
        self.kernels = self._kernels()
        self.operators = self._operators()

    @property
    def on_gpu(self) -> bool:
        """Whether a device worked beside the host."""
        return bool(self.kernels)

    def step_at(self, time: float) -> int:
        """Return the number of the step at a time, OUTSIDE where there is none."""
        number = bisect_right(self._starts, time) - 1
        return number if number >= 0 and time <= self.steps[number][1] else OUTSIDE

    def phase_at(self, time: float) -> str:
        """Return the innermost phase at a time, REST where there is none."""
        place = bisect_right(self._times, time) - 1
        return self._names[place] if place >= 0 else REST

    def _kernels(self) -> list[TracedWork]:
        launched = {
            event["args"]["correlation"]: float(event["ts"])
            for event in self.events
            if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
        }
        kernels = []
        for event in self.events:
            if event.get("cat") not in DEVICE_WORK:
                continue
            start, end = stretch_of(event)
            details = event.get("args", {})
            at = launched.get(details.get("correlation"), start)
            place = (self.phase_at(at), self.step_at(at), int(details.get("stream", 0)))
            kernels.append(TracedWork(event["name"], start, end, *place, details, end - start))
        return [kernel for kernel in kernels if kernel.step != OUTSIDE]

    def _operators(self) -> list[TracedWork]:
        by_thread: dict[int, list[TraceEvent]] = {}
        for event in self.events:
            if event.get("cat") == "cpu_op":
                by_thread.setdefault(event["tid"], []).append(event)
        found: list[TracedWork] = []
        for events in by_thread.values():
            found += self._of_thread(events)
        return [operator for operator in found if operator.step != OUTSIDE]

    def _of_thread(self, events: list[TraceEvent]) -> list[TracedWork]:
        events.sort(key=lambda event: (event["ts"], -event["dur"]))
        found: list[TracedWork] = []
        self_times: list[float] = []
        callers: list[int] = []  # places in `found` of those that have not ended
        for event in events:
            start, end = stretch_of(event)
            while callers and found[callers[-1]].end <= start:
                callers.pop()
            if callers:
                self_times[callers[-1]] -= end - start
            place = (self.phase_at(start), self.step_at(start), event["tid"], event.get("args", {}))
            found.append(TracedWork(event["name"], start, end, *place, 0.0))
            self_times.append(end - start)
            callers.append(len(found) - 1)
        return [work._replace(self_time=time) for work, time in zip(found, self_times, strict=True)]


def stretch_of(event: TraceEvent) -> Stretch:
    """Return when an event begins and ends, in microseconds."""
    start = float(event["ts"])
    return start, start + float(event.get("dur", 0.0))


def union(stretches: Iterable[Stretch], *, bridged: float = 0.0) -> list[Stretch]:
    """Return the stretches in which any of some stretches is under way; gaps up to `bridged` count too."""
    merged: list[Stretch] = []
    for start, end in sorted(stretches):
        if merged and start <= merged[-1][1] + bridged:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(stretches: Iterable[Stretch]) -> float:
    """Return the length of stretches that do not overlap."""
    return sum(end - start for start, end in stretches)


def overlap(stretch: Stretch, others: Sequence[Stretch]) -> float:
    """Return how much of a stretch lies in others, which do not overlap and are in order."""
    covered = 0.0
    for start, end in others[max(0, bisect_right(others, (stretch[0],)) - 1) :]:
        if start >= stretch[1]:
            break
        covered += max(0.0, min(end, stretch[1]) - max(start, stretch[0]))
    return covered


def _innermost(stretches: Sequence[tuple[float, float, str]]) -> tuple[list[float], list[str]]:
    """Return the times at which the innermost phase changes, and its name from each of them on."""
    times: list[float] = []
    names: list[str] = []
    open_phases: list[tuple[float, str]] = []  # end, name

    def close(until: float) -> None:
        while open_phases and open_phases[-1][0] <= until:
            end, _ = open_phases.pop()
            times.append(end)
            names.append(open_phases[-1][1] if open_phases else REST)

    for start, end, name in stretches:
        close(start)
        times.append(start)
        names.append(name)
        open_phases.append((end, name))
    close(float("inf"))
    return times, names
