"""The collectives of a trace by phase and kind: calls, bytes, times, and how much of them nothing else hides.

NCCL: kernels, whose details (Kineto's names) say what was sent. gloo: the operator `c10d::...` of the host says when a
collective was begun, an annotation `gloo:...` of gloo's threads when it ran. The two have no number in common. So they
are matched in their order: gloo begins the collectives of a group in the order of the calls.

Bus bandwidth is the unit of nccl-tests (its PERFORMANCE.md): bytes by time, times how often each byte crosses a rank's
link in a ring. So a link's rate is the limit of every kind.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cosmos_scale.profiling.trace import Stretch, Trace, TracedWork, length, overlap, stretch_of, union

GLOO, OPERATOR = "gloo:", "c10d::"
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
ITEM_BYTES = {
    # by the names of C++ (operators) and of torch's enumeration (NCCL)
    "float": 4,
    "c10::bfloat16": 2,
    "bfloat16": 2,
    "c10::half": 2,
    "half": 2,
    "double": 8,
    "long int": 8,
    "long": 8,
    "int": 4,
    "unsigned char": 1,
    "byte": 1,
    "bool": 1,
}
# The engine's hooks run in this operator: they begin collectives and wait for them.
_OF_HOOKS = "AccumulateGrad"
# On a CPU the host's own code runs between operators. A gap that is longer is a wait.
HOST_GAP = 100.0  # microseconds


class CollectiveCall(NamedTuple):
    """One collective. nbytes: of the whole tensor, not of a rank's share; None where the trace does not say.

    milliseconds, exposed: None where it is not in the trace how long it ran. exposed: what no computation of this rank
    hides, nor an earlier collective.
    """

    phase: str
    kind: str
    step: int
    nbytes: int | None
    milliseconds: float | None
    exposed: float | None


class CollectiveTimes(NamedTuple):
    """The collectives of a kind in a phase. calls, exposed_ms: of a step. mbytes, ms: of a call.

    bus_gbs: bus bandwidth, GB/s. None where it is not known.
    """

    phase: str
    kind: str
    calls: float
    mbytes: float | None
    ms: float | None
    bus_gbs: float | None
    exposed_ms: float | None


def collective_calls(trace: Trace) -> list[CollectiveCall]:
    """Return the collectives of a trace's steps."""
    return _of_nccl(trace) if trace.on_gpu else _of_gloo(trace)


def summarise(
    timed: Sequence[CollectiveCall], steps: int, sized: Sequence[CollectiveCall], world_size: int
) -> list[CollectiveTimes]:
    """Summarise calls by phase and kind, in the order in which they first come.

    timed: calls of so many steps. sized: calls of a trace that says the bytes; they may be the same.
    """
    rows = []
    for phase, kind in dict.fromkeys((call.phase, call.kind) for call in timed):
        mine = [call for call in timed if (call.phase, call.kind) == (phase, kind)]
        sizes = [call.nbytes for call in sized if (call.phase, call.kind) == (phase, kind) and call.nbytes is not None]
        times = [call.milliseconds for call in mine if call.milliseconds is not None]
        exposed = [call.exposed for call in mine if call.exposed is not None]
        mbytes = sum(sizes) / len(sizes) / 1e6 if sizes else None
        ms = sum(times) / len(times) if times else None
        bus = None if not mbytes or not ms else mbytes / ms * bus_factor(kind, world_size)
        shown = sum(exposed) / steps if exposed else None
        rows.append(CollectiveTimes(phase, kind, len(mine) / steps, mbytes, ms, bus, shown))
    return rows


def bus_factor(kind: str, world_size: int) -> float:
    """Return how often each byte of a collective's whole tensor crosses a rank's link in a ring."""
    share = (world_size - 1) / world_size
    return {"all_reduce": 2 * share, "broadcast": 1.0}.get(kind, share)


def is_collective(name: str) -> bool:
    """Tell whether a kernel or an operator moves data between ranks."""
    return name.lower().startswith(("nccl", GLOO, OPERATOR))


def _of_nccl(trace: Trace) -> list[CollectiveCall]:
    hidden = _Hidden((work.start, work.end) for work in trace.kernels if not is_collective(work.name))
    calls = []
    for work in sorted(trace.kernels, key=lambda work: work.start):
        details = work.details
        kind = _kind(str(details.get("Collective name", work.name)))
        if not is_collective(work.name) or kind is None:
            continue
        size = ITEM_BYTES.get(str(details.get("dtype", "")).lower())
        elements = max(int(details.get("In msg nelems", 0)), int(details.get("Out msg nelems", 0)))
        nbytes = elements * size if size and elements else None
        calls.append(_call(work, kind, nbytes, (work.start, work.end), hidden))
    return calls


def _of_gloo(trace: Trace) -> list[CollectiveCall]:
    ran = sorted(
        (event for event in trace.events if str(event["name"]).startswith(GLOO)), key=lambda event: float(event["ts"])
    )
    of_gloo = {event["tid"] for event in ran}
    # What runs while the host waits for data is hidden too.
    waits = [(start, end) for start, end, name in trace.phase_stretches if name == "data"]
    computing = [
        (work.start, work.end)
        for work in trace.operators
        if work.lane not in of_gloo and not is_collective(work.name) and _OF_HOOKS not in work.name
    ]
    hidden = _Hidden([*union(computing, bridged=HOST_GAP), *waits])
    begun = sorted(
        (work for work in trace.operators if work.name.startswith(OPERATOR) and work.lane == trace.main_thread),
        key=lambda work: work.start,
    )
    calls = []
    for work in begun:
        kind = _kind(work.name)
        if kind is None:
            continue
        # gloo makes a reduce_scatter of an all_reduce.
        names = {GLOO + kind} | ({GLOO + "all_reduce"} if kind == "reduce_scatter" else set())
        event = next((event for event in ran if event["name"] in names and float(event["ts"]) >= work.start), None)
        if event is not None:
            ran.remove(event)
        nbytes = _operand_bytes(work.details, {} if event is None else event.get("args", {}))
        calls.append(_call(work, kind, nbytes, None if event is None else stretch_of(event), hidden))
    return calls


class _Hidden:
    """The moments in which a collective costs nothing: the rank computes, or waits for an earlier collective."""

    def __init__(self, computing: Iterable[Stretch]) -> None:
        self._taken = union(computing)

    def exposed(self, ran: Stretch) -> float:
        """Return how much of a collective costs time; the moments of it count for no later one."""
        free = length([ran]) - overlap(ran, self._taken)
        self._taken = union([*self._taken, ran])
        return free


def _call(work: TracedWork, kind: str, nbytes: int | None, ran: Stretch | None, hidden: _Hidden) -> CollectiveCall:
    if ran is None:
        return CollectiveCall(work.phase, kind, work.step, nbytes, None, None)
    return CollectiveCall(work.phase, kind, work.step, nbytes, length([ran]) / 1e3, hidden.exposed(ran) / 1e3)


def _kind(name: str) -> str | None:
    """Return the kind that a name means: of an operator, of NCCL's kernel, or of torch's own for NCCL."""
    plain = re.sub(r"[^a-z]", "", name.lower())
    words = {"allreduce": 0, "allgather": 1, "reducescatter": 2, "broadcast": 3}
    return next((KINDS[place] for word, place in words.items() if word in plain), None)


def _operand_bytes(operator: Mapping[str, Any], annotation: Mapping[str, Any]) -> int | None:
    """Return the bytes of an operator's largest tensor; None where shapes were not recorded."""
    elements = max((math.prod(shape) for shape in _shapes(operator.get("Input Dims", ()))), default=0)
    types = [str(name).lower() for details in (operator, annotation) for name in details.get("Input type", ())]
    size = next((ITEM_BYTES[name] for name in types if name in ITEM_BYTES), None)
    return elements * size if elements and size else None


def _shapes(dims: Any) -> Iterable[list[int]]:
    """Yield the shapes in an operator's dimensions, in which a list of tensors is a list of shapes."""
    if isinstance(dims, list) and dims and all(isinstance(size, int) for size in dims):
        yield dims
    elif isinstance(dims, list | tuple):
        for part in dims:
            yield from _shapes(part)
