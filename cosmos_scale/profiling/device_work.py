"""What the device works at in a step, from a trace: by phase, by kind, and the kernels or operators that take most."""

from typing import NamedTuple

from cosmos_scale.profiling.collective_times import is_collective
from cosmos_scale.profiling.trace import Stretch, Trace, TracedWork, length, overlap, union

TOP = 15
_OF_AUTOGRAD = "autograd::engine::evaluate_function: "
# By words in the names of kernels (cuBLAS, CUTLASS, FlashAttention, Triton) and of operators; the first that fits.
_KINDS = {
    "collectives": ("nccl", "c10d::", "gloo:"),
    "attention": ("flash", "fmha", "attention", "attn", "varlen"),
    "matmul": (
        "gemm",
        "cutlass",
        "xmma",
        "cublas",
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "baddbmm",
        "linear",
        "nvjet",
    ),
    "copies": ("memcpy", "memset", "aten::copy_", "aten::cat", "aten::clone", "_foreach_copy_"),
}
ELSE = "element-wise"


class TopWork(NamedTuple):
    """A kernel, or an operator of a CPU, in one phase. ms, calls: of a step. share: of all such work."""

    name: str
    phase: str
    ms: float
    calls: float
    share: float


def busy_by_phase(trace: Trace) -> dict[str, float]:
    """Return the milliseconds of a step in which a GPU works for each phase; each moment counts once.

    A moment belongs to the work on the stream that has most of it, then to other work, last to a collective: so a
    collective counts where nothing hides it.
    """
    computing = [kernel for kernel in trace.kernels if not is_collective(kernel.name)]
    main = _busiest_lane(computing)
    groups = (
        [kernel for kernel in computing if kernel.lane == main],
        [kernel for kernel in computing if kernel.lane != main],
        [kernel for kernel in trace.kernels if is_collective(kernel.name)],
    )
    taken: list[Stretch] = []
    busy: dict[str, float] = {}
    for group in groups:
        by_phase: dict[str, list[Stretch]] = {}
        for kernel in group:
            by_phase.setdefault(kernel.phase, []).append((kernel.start, kernel.end))
        for phase, stretches in by_phase.items():
            own = union(stretches)
            free = length(own) - sum(overlap(stretch, taken) for stretch in own)
            busy[phase] = busy.get(phase, 0.0) + free / 1e3 / len(trace.steps)
            taken = union([*taken, *own])
    return busy


def work_by_kind(trace: Trace) -> dict[str, float]:
    """Return the milliseconds of a step that each kind of work takes, the most first; work at one time counts twice."""
    kinds: dict[str, float] = {}
    for work in _work(trace):
        kind = work_kind(work.name)
        kinds[kind] = kinds.get(kind, 0.0) + work.self_time / 1e3 / len(trace.steps)
    return dict(sorted(kinds.items(), key=lambda kind: -kind[1]))


def top_work(trace: Trace) -> list[TopWork]:
    """Return the kernels of a GPU, or the operators of a CPU by their own time, that take most."""
    found: dict[tuple[str, str], list[float]] = {}
    for work in _work(trace):
        found.setdefault((work.name.removeprefix(_OF_AUTOGRAD), work.phase), []).append(work.self_time)
    whole, steps = sum(map(sum, found.values())), len(trace.steps)
    rows = [
        TopWork(name, phase, sum(times) / 1e3 / steps, len(times) / steps, sum(times) / whole)
        for (name, phase), times in found.items()
    ]
    return sorted(rows, key=lambda row: -row.ms)[:TOP]


def work_kind(name: str) -> str:
    """Return the kind of a kernel or operator."""
    lower = name.lower()
    return next((kind for kind, words in _KINDS.items() if any(word in lower for word in words)), ELSE)


def _work(trace: Trace) -> list[TracedWork]:
    if trace.on_gpu:
        return trace.kernels
    return [work for work in trace.operators if work.lane == trace.main_thread and not is_collective(work.name)]


def _busiest_lane(kernels: list[TracedWork]) -> int:
    lanes: dict[int, float] = {}
    for kernel in kernels:
        lanes[kernel.lane] = lanes.get(kernel.lane, 0.0) + kernel.end - kernel.start
    return max(lanes, key=lambda lane: lanes[lane], default=0)
