"""The phases of a step over all ranks: a row each, which add up to the step."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cosmos_scale.phases import STEP_PHASES
from cosmos_scale.profiling.spread import Spread, spread_of
from cosmos_scale.profiling.step_clock import REST, StepTimes

IDLE = "idle"
LABELS = {
    "data": "wait for data",
    "copy": "copy to the device",
    "ranks": "wait for other ranks",
    "student": "student forward",
    "teacher": "teacher forward",
    "loss": "loss",
    "backward": "backward",
    "update": "update",
    "refresh": "teacher's refresh, exposed",
    "figures": "read the step before",
    REST: "rest",
    IDLE: "idle, host late",
}
REDUCTION = "backward/reduction"
# Phases in which a GPU gets no work: what its stream does not do in them is the host's lateness.
_OF_THE_HOST = ("ranks", "figures", REST)
# Phases that wait on purpose: an empty device in them is no lateness.
_WAITS = ("data", "copy")


class PhaseRow(NamedTuple):
    """A phase, in milliseconds: means over the ranks, spread over the steps.

    host: None for the device's own idle time. rank_min, rank_max: of the ranks' medians on the device; slowest: the
    rank of rank_max. reduction: of the backward, what of the gradients' reduction nothing hides; else None.
    """

    name: str
    device: Spread
    host: Spread | None
    rank_min: float
    rank_max: float
    slowest: int
    reduction: Spread | None = None


def phase_rows(
    steps: Sequence[Sequence[StepTimes]], busy: Sequence[Mapping[str, float]], reduction_ms: float | None
) -> list[PhaseRow]:
    """Return a row for each phase that takes time.

    steps: of each rank, the same steps. busy: of each rank, the milliseconds in which its GPU works for each phase;
    empty on CPUs. reduction_ms: the exposed reduction by a trace, where the clock does not see it.
    """
    device = [_without_idle(own, working) for own, working in zip(steps, busy, strict=True)]
    host = [[step.host for step in own] for own in steps]
    rows = []
    for name in (*STEP_PHASES, REST, IDLE):
        by_rank = [[phases.get(name, 0.0) for phases in own] for own in device]
        on_host = [[phases.get(name, 0.0) for phases in own] for own in host]
        if not any(map(sum, by_rank)) and not any(map(sum, on_host)):
            continue
        medians = [statistics.median(own) for own in by_rank]
        rows.append(
            PhaseRow(
                name,
                _over_ranks(by_rank),
                None if name == IDLE else _over_ranks(on_host),
                min(medians),
                max(medians),
                medians.index(max(medians)),
                _reduction(device, reduction_ms) if name == "backward" else None,
            )
        )
    return rows


class PhaseSum(NamedTuple):
    """How the named phases add up. Milliseconds, medians over steps of means over ranks.

    difference: what of a step lies in no named phase, as a part of the step; the median over the steps.
    """

    phases_ms: float
    step_ms: float
    difference: float


def phase_sum(steps: Sequence[Sequence[StepTimes]], busy: Sequence[Mapping[str, float]]) -> PhaseSum:
    """Add up the named phases of each step. Arguments as of `phase_rows`."""
    device = [_without_idle(own, working) for own, working in zip(steps, busy, strict=True)]
    named = [
        statistics.fmean(sum(ms for key, ms in phases.items() if "/" not in key and key != REST) for phases in of_step)
        for of_step in zip(*device, strict=True)
    ]
    whole = [statistics.fmean(step.device_ms for step in of_step) for of_step in zip(*steps, strict=True)]
    parts = [1.0 - phases / step for phases, step in zip(named, whole, strict=True)]
    return PhaseSum(statistics.median(named), statistics.median(whole), statistics.median(parts))


def slowest_rank(steps: Sequence[Sequence[StepTimes]]) -> int:
    """Return the rank that takes longest for what it does alone: its data, their copy, the student's forward."""
    own = [
        statistics.median(sum(step.device.get(name, 0.0) for name in ("data", "copy", "student")) for step in of_rank)
        for of_rank in steps
    ]
    return own.index(max(own))


def _without_idle(steps: Sequence[StepTimes], busy: Mapping[str, float]) -> list[dict[str, float]]:
    """Return the steps' device times in which idle time is a phase of its own; as they are on a CPU."""
    if not busy:
        return [dict(step.device) for step in steps]
    idle = {}
    for name in STEP_PHASES:
        whole = statistics.median(step.device.get(name, 0.0) for step in steps)
        idle[name] = 0.0 if name in _WAITS else max(0.0, whole - busy.get(name, 0.0))
    found = []
    for step in steps:
        phases = dict(step.device)
        late = sum(phases.pop(name, 0.0) for name in _OF_THE_HOST)
        for name in STEP_PHASES:
            if name in phases:
                own = min(phases[name], idle[name])
                phases[name] -= own
                late += own
        found.append(phases | {IDLE: late})
    return found


def _reduction(device: Sequence[Sequence[Mapping[str, float]]], by_trace: float | None) -> Spread | None:
    if any(REDUCTION in phases for own in device for phases in own):
        return _over_ranks([[phases.get(REDUCTION, 0.0) for phases in own] for own in device])
    return None if by_trace is None else Spread(by_trace, by_trace, by_trace)


def _over_ranks(values: Sequence[Sequence[float]]) -> Spread:
    """Return the spread over steps of the means over ranks. values: of each rank, of each step."""
    return spread_of([statistics.fmean(of_step) for of_step in zip(*values, strict=True)])
