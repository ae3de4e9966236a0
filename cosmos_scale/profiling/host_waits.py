"""Where the host waits in a step, with file and line: for a GPU, for another thread, for a collective.

Read from a trace with Python's stack. Its steps are slower than others, since each call of Python is recorded. So the
places and counts hold; the milliseconds are of that trace.
"""

import re
from bisect import bisect_right
from typing import Any, NamedTuple

from cosmos_scale.profiling.trace import OUTSIDE, Trace, TraceEvent, stretch_of

PACKAGE, PYTHON = "cosmos_scale/", "python_function"
LEAST_US = 50.0  # shorter waits cost nothing
# Calls of CUDA in which the host waits for the device. cudaMemcpy waits; cudaMemcpyAsync to pageable memory does too,
# but nothing in a trace tells it from others.
OF_CUDA = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}
OF_PYTHON = {
    "<built-in method wait of pybind11": "a collective",
    "<built-in method acquire of _thread.lock": "another thread",
    "<method 'acquire' of '_thread.lock'": "another thread",
    "<method 'poll' of 'select.poll'": "another process",
    "<built-in method poll of select.poll": "another process",
}
_FRAME = re.compile(r"^(?P<file>.+\.py)\((?P<line>\d+)\): (?P<function>.+)$")


class HostWait(NamedTuple):
    """A place of ours in which the host waits. calls: of a step. ms: of all its calls in a step."""

    place: str
    what: str
    phase: str
    calls: float
    ms: float


def host_waits(trace: Trace) -> list[HostWait]:
    """Return the waits of the thread that trains, the longest first; those that take no time are left out."""
    main = [event for event in trace.events if event.get("tid") == trace.main_thread]
    frames = sorted(
        (event for event in main if event.get("cat") == PYTHON),
        key=lambda event: (event["ts"], -event["dur"]),
    )
    known = {event["args"].get("Python id"): event for event in frames}
    starts = [float(event["ts"]) for event in frames]
    found: dict[tuple[str, str, str], list[float]] = {}
    for event in main:
        what = _wait_of(event)
        start, end = stretch_of(event)
        if what is None or end - start < LEAST_US or trace.step_at(start) == OUTSIDE:
            continue
        frame = event if event.get("cat") == PYTHON else _enclosing(frames, starts, start, end)
        found.setdefault((_place(frame, known), what, trace.phase_at(start)), []).append(end - start)
    steps = max(1, len(trace.steps))
    waits = [HostWait(*key, len(times) / steps, sum(times) / 1e3 / steps) for key, times in found.items()]
    return sorted(waits, key=lambda wait: -wait.ms)


def _wait_of(event: TraceEvent) -> str | None:
    name = str(event["name"])
    if event.get("cat") in ("cuda_runtime", "cuda_driver"):
        return name if name in OF_CUDA else None
    if event.get("cat") != PYTHON:
        return None
    return next((what for begin, what in OF_PYTHON.items() if name.startswith(begin)), None)


def _enclosing(frames: list[TraceEvent], starts: list[float], start: float, end: float) -> TraceEvent | None:
    """Return the innermost call of Python around a stretch."""
    for place in range(bisect_right(starts, start) - 1, -1, -1):
        if stretch_of(frames[place])[1] >= end:
            return frames[place]
    return None


def _place(frame: TraceEvent | None, known: dict[Any, TraceEvent]) -> str:
    """Return our file and line that calls a frame, through others' code; "elsewhere" where none of ours does."""
    while frame is not None:
        called_from = str(frame["args"].get("CallFrom", ""))
        if PACKAGE in called_from:
            return PACKAGE + called_from.rpartition(PACKAGE)[2]
        own = _FRAME.match(str(frame["name"]))
        if own is not None and PACKAGE in own["file"]:  # its lines are not recorded: older versions of torch
            return f"{PACKAGE}{own['file'].rpartition(PACKAGE)[2]}:{own['line']}"
        frame = known.get(frame["args"].get("Python parent id"))
    return "elsewhere"
