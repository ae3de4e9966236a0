"""The memory of a step over its time, from a trace: the peak, its moment, and what holds the memory there."""

from typing import Any, NamedTuple

from cosmos_scale.profiling.trace import OUTSIDE, Trace

BEFORE = "before the step"  # the owner of what a step finds: weights and states
MOST_POINTS = 240
_CPU, _CUDA = 0, 1  # device types, as torch numbers them


class MemoryTimeline(NamedTuple):
    """The memory of one step, the one that takes most. Bytes; milliseconds from the step's begin.

    owners: what is held at the peak, by the phase that has taken it, or BEFORE. largest: the largest block taken.
    points: (time, bytes held), the peak among them. step_ms: the step's length. phases: (name, begin, end). known:
    whether what the step found is counted, as on GPUs: torch does not count a CPU's memory outside a profile.
    """

    peak: int
    peak_ms: float
    peak_phase: str
    owners: dict[str, int]
    largest: int
    points: list[tuple[float, int]]
    step_ms: float
    phases: list[tuple[str, float, float]]
    known: bool


def memory_timeline(trace: Trace, *, found: int) -> MemoryTimeline | None:
    """Return the timeline of the trace's step that takes most memory; None where no memory was recorded.

    found: bytes that are held on a CPU as the recording begins, which the trace does not know: by the formula of
    engine/memory.py. A step finds what the steps before it have left too, such as a collective that still runs.
    """
    events = [event for event in trace.events if event["name"] == "[memory]"]
    device = _CUDA if any(event["args"]["Device Type"] == _CUDA for event in events) else _CPU
    events = sorted((event for event in events if event["args"]["Device Type"] == device), key=lambda each: each["ts"])
    of_steps: dict[int, list[Any]] = {}
    for event in events:
        if (step := trace.step_at(float(event["ts"]))) != OUTSIDE:
            of_steps.setdefault(step, []).append(event)
    lines = []
    for step, own in of_steps.items():
        begin, first = trace.steps[step][0], own[0]["args"]
        at_start = int(first["Total Allocated"]) - int(first["Bytes"])
        if device == _CPU:
            at_start = found + _still_held(events, begin)
        lines.append(_of_step(trace, step, own, at_start, known=device == _CUDA))
    return max(lines, key=lambda line: line.peak, default=None)


def _of_step(trace: Trace, step: int, events: list[Any], at_start: int, *, known: bool) -> MemoryTimeline:
    begin = trace.steps[step][0]
    live: dict[int, tuple[int, str]] = {}  # bytes and phase by address
    freed_older = 0  # bytes of what the step found, and has given back
    held, largest, peak = at_start, 0, (at_start, begin, {BEFORE: at_start})
    points = [(0.0, at_start)]
    for event in events:
        details, time = event["args"], float(event["ts"])
        nbytes, address = int(details["Bytes"]), int(details["Addr"])
        held += nbytes
        if nbytes > 0:
            held -= live.get(address, (0, ""))[0]  # given back unseen
            live[address] = (nbytes, trace.phase_at(time))
            largest = max(largest, nbytes)
        elif address in live:
            del live[address]
        else:
            freed_older -= nbytes
        points.append(((time - begin) / 1e3, held))
        if held > peak[0]:
            owners = {BEFORE: at_start - freed_older}
            for size, phase in live.values():
                owners[phase] = owners.get(phase, 0) + size
            peak = (held, time, owners)
    nbytes, time, owners = peak
    owners = dict(sorted(owners.items(), key=lambda owner: -owner[1]))
    end = trace.steps[step][1]
    return MemoryTimeline(
        peak=nbytes,
        peak_ms=(time - begin) / 1e3,
        peak_phase=trace.phase_at(time),
        owners=owners,
        largest=largest,
        points=_thinned(points),
        step_ms=(end - begin) / 1e3,
        phases=[
            (name, (start - begin) / 1e3, (stop - begin) / 1e3)
            for start, stop, name in trace.phase_stretches
            if begin <= start and stop <= end
        ],
        known=known,
    )


def _still_held(events: list[Any], moment: float) -> int:
    """Return the bytes taken before a moment and given back after it.

    Of what else was taken before it torch may not have seen the end, where gloo's threads give memory back.
    """
    taken: dict[int, int] = {}  # by address
    held = 0
    for event in events:
        address, nbytes = event["args"]["Addr"], int(event["args"]["Bytes"])
        before = taken.pop(address, 0)
        if float(event["ts"]) < moment:
            if nbytes > 0:
                taken[address] = nbytes
        elif nbytes < 0:
            held += before
    return held


def _thinned(points: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Return at most about MOST_POINTS points: of each stretch of them the highest."""
    each = -(-len(points) // MOST_POINTS)
    return [max(points[start : start + each], key=lambda point: point[1]) for start in range(0, len(points), each)]
