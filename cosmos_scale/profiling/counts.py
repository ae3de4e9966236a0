"""What one rank's step asks for, as records that go between processes as JSON.

`Counts` is what the planner's arithmetic reads: nothing in it is a time.
"""

import json
from dataclasses import asdict, dataclass, field

PHASES = ("student", "teacher", "loss", "backward", "update", "refresh")
"""The phases of a step, in their order."""


@dataclass(frozen=True)
class Exchange:
    """Collectives of one phase that are alike.

    kind: all_reduce, all_gather, reduce_scatter or broadcast. nbytes: of one of them, the bytes of the largest tensor
    that it is handed: the whole one, not a rank's share. dtype: as torch names it, "bfloat16". done: of each call, the
    share of the phase's products that the host had called before it; it takes no part in comparisons.
    """

    phase: str
    kind: str
    dtype: str
    nbytes: int
    calls: int
    done: tuple[float, ...] = field(default=(), compare=False)

    def received(self, world_size: int) -> float:
        """Return the bytes that a rank receives in all of the calls, where ranks form a ring."""
        share = (world_size - 1) / world_size
        return self.calls * self.nbytes * {"all_reduce": 2 * share, "broadcast": 1.0}.get(self.kind, share)


@dataclass(frozen=True)
class OperatorCount:
    """Operators of one phase that are alike.

    group: products, attention, copies, or norms and pointwise. shape: of a product (batch, m, k, n); of attention
    (segments, longest queries, longest keys, heads, width of a head, 1 if causal else 0); else empty, and then
    operators of all sizes are added up. launches: of kernels, in all calls. read, written: bytes, in all calls. flops:
    of products and attention, 2 for a multiplication and an addition, in all calls; what a causal mask hides is left
    out.
    """

    phase: str
    group: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    launches: int
    read: int
    written: int
    flops: int

    @property
    def nbytes(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


@dataclass(frozen=True)
class PhaseMemory:
    """A rank's memory in a phase, in bytes. peak: the most at one time.

    parts: the peak by owner. left: what is held at the end of the phase, by owner. most: the most of each owner at one
    time, which may be another moment. Owners are those of `allocations.OWNERS`; "activations" is what the student's
    forward keeps for the backward. taken: the peak by the phase that has taken it, see `allocations.PhasePeak`.
    """

    phase: str
    peak: int
    parts: dict[str, int]
    left: dict[str, int]
    most: dict[str, int] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Counts:
    """A step of one rank of world_size, of `samples` samples on it.

    as_gpu: whether the code ran as it does on a GPU: its kernels, its attention, its allocator's granule. elements: of
    the student's parameters. exchanges, operators: of the whole step, each phase's apart. memory: of each phase in the
    order of PHASES. host_calls: by phase, the operators that the host called: those that launch nothing too. tokens: of
    the packed captions and crops of the student, and of the teacher. seconds: how long the count took.
    """

    world_size: int
    rank: int
    samples: int
    stage: int
    precision: str
    recompute: int
    micro_batches: int
    as_gpu: bool
    elements: int
    exchanges: tuple[Exchange, ...]
    operators: tuple[OperatorCount, ...]
    memory: tuple[PhaseMemory, ...]
    host_calls: dict[str, int]
    seconds: float

    @property
    def peak(self) -> PhaseMemory:
        """The phase with the highest peak."""
        return max(self.memory, key=lambda memory: memory.peak)

    def memory_of(self, phase: str) -> PhaseMemory:
        """Return the memory of a phase."""
        return next(memory for memory in self.memory if memory.phase == phase)

    def launches(self) -> dict[str, int]:
        """Return the launches of each phase."""
        return {phase: sum(found.launches for found in self.operators if found.phase == phase) for phase in PHASES}

    def to_json(self) -> str:
        """Return the counts as JSON that `counts_of_json` reads back to equal ones."""
        return json.dumps(asdict(self))


def counts_of_json(text: str) -> Counts:
    """Return the counts that `Counts.to_json` wrote."""
    keys = json.loads(text)
    keys["exchanges"] = tuple(Exchange(**{**row, "done": tuple(row["done"])}) for row in keys["exchanges"])
    keys["operators"] = tuple(OperatorCount(**{**row, "shape": tuple(row["shape"])}) for row in keys["operators"])
    keys["memory"] = tuple(PhaseMemory(**row) for row in keys["memory"])
    return Counts(**keys)
