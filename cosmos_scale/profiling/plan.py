"""What a run asks of a cluster, from counts of its own step: memory, largest batches, work, and traffic."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cosmos_scale.config import RunConfig
from cosmos_scale.errors import UserError
from cosmos_scale.profiling.counts import Counts, Exchange
from cosmos_scale.profiling.fake_run import count_runs
from cosmos_scale.profiling.flops import loss_flops, student_flops, teacher_flops
from cosmos_scale.profiling.machine import Machine
from cosmos_scale.profiling.operators import META
from cosmos_scale.profiling.planned_batch import planned_batch, planned_lengths

GIB = 2**30
OUTSIDE_TORCH = round(2.3 * GIB)
"""Assumed bytes of a GPU that torch's allocator does not see: CUDA's context, NCCL's buffers, cuBLAS's workspace."""
OUTSIDE_TORCH_ON_CPU = round(0.85 * GIB)
"""Bytes of a process beside its tensors: Python, libraries, gloo. Measured: a rank of a tiny run holds 0.89 GiB."""
RECOMPUTES = (0, 2, 1)
FEWEST = 8  # samples a GPU of the smaller of the two counts that a largest batch is found from
NEARLY_OVER = 0.95  # of a phase's products: a collective that comes later is hidden by nothing


@dataclass(frozen=True)
class Cluster:
    """So many nodes of so many equal GPUs."""

    nodes: int
    gpus: int
    machine: Machine

    @property
    def world_size(self) -> int:
        """All GPUs, one rank each."""
        return self.nodes * self.gpus

    @property
    def memory(self) -> float:
        """Bytes that a rank may have: a GPU's, or its share of a host's."""
        return self.machine.memory_gib * GIB / (1 if self.machine.is_gpu else self.gpus)

    @property
    def cores(self) -> float:
        """Cores that a rank may use: those for a GPU, or its share of a host's."""
        return self.machine.cores / (1 if self.machine.is_gpu else self.gpus)

    @property
    def outside_torch(self) -> int:
        """Bytes of a rank that torch's allocator does not see."""
        return OUTSIDE_TORCH if self.machine.is_gpu else OUTSIDE_TORCH_ON_CPU

    def across(self, nbytes: float, kind: str) -> float:
        """Return the bytes that a GPU takes in from other nodes for a collective on a tensor of so many bytes.

        Inside a node each GPU works on its share, so that a byte crosses into a node once, or twice to sum it up.
        """
        ways = 2 if kind == "all_reduce" else 1
        return ways * nbytes / self.gpus * (self.nodes - 1) / self.nodes


@dataclass(frozen=True)
class StepOperations:
    """Operations of a step and rank. needed: by student, teacher and loss. executed: with what is computed again."""

    student: int
    teacher: int
    loss: int
    executed: int

    @property
    def needed(self) -> int:
        """All that the method needs."""
        return self.student + self.teacher + self.loss


@dataclass(frozen=True)
class Traffic:
    """What a rank exchanges for one purpose. received, across: bytes a step, in all and from other nodes.

    hidden: the share of the bytes that the device has other work to hide behind; behind: what that work is.
    """

    purpose: str
    calls: int
    received: float
    across: float
    hidden: float
    behind: str


@dataclass(frozen=True)
class Plan:
    """What is known of a run on a cluster without a clock.

    counts: of a step with the config's own batch. largest: by `train.recompute`, the most samples a GPU that fit; None
    where not even one micro-batch of single samples does.
    """

    config: RunConfig
    cluster: Cluster
    counts: Counts
    largest: dict[int, int | None]
    work: StepOperations

    @property
    def free(self) -> float:
        """Bytes that torch may take for a rank."""
        return self.cluster.memory - self.cluster.outside_torch

    def traffic(self) -> list[Traffic]:
        """Return what a rank exchanges, by purpose, in the order of a step."""
        rows: dict[str, list[Exchange]] = {}
        for exchange in self.counts.exchanges:
            rows.setdefault(_purpose(exchange, self.counts), []).append(exchange)
        return [self._traffic_of(purpose, exchanges) for purpose, exchanges in rows.items()]

    def _traffic_of(self, purpose: str, exchanges: Sequence[Exchange]) -> Traffic:
        received = sum(exchange.received(self.counts.world_size) for exchange in exchanges)
        across = sum(x.calls * self.cluster.across(x.nbytes, x.kind) for x in exchanges)
        hidden = sum(x.received(self.counts.world_size) * _hidden(x, self.counts.stage) for x in exchanges)
        behind = {"backward": "backward", "refresh": "the student's forward"}.get(exchanges[0].phase, "the forward")
        share = hidden / received if received else 0.0
        return Traffic(
            purpose, sum(x.calls for x in exchanges), received, across, share, behind if share else "nothing"
        )


def make_plan(config: RunConfig, cluster: Cluster) -> Plan:
    """Count a run's step on a cluster. Takes half a minute, at stage 3 with many ranks minutes.

    Raises UserError: the GPUs do not divide the batch, the precision is fp16, or the step cannot be counted.
    """
    if config.precision == "fp16":
        raise UserError("precision: 'fp16', but CPUs lack it; rule: plan with bf16, whose tensors have the same bytes")
    samples = config.samples_per_rank(cluster.world_size)
    sizes = _two_sizes(samples, config.train.micro_batches)
    variants = {every: _with_recompute(config, every) for every in RECOMPUTES}
    runs = [(config, samples)] + [(variant, size) for variant in variants.values() for size in sizes]
    counts, *others = count_runs(runs, cluster.world_size, as_gpu=cluster.machine.is_gpu)
    free = cluster.memory - cluster.outside_torch
    largest = {
        every: _largest(others[2 * place : 2 * place + 2], free, config.train.micro_batches)
        for place, every in enumerate(variants)
    }
    return Plan(config, cluster, counts, largest, count_work(config, counts))


def count_work(config: RunConfig, counts: Counts) -> StepOperations:
    """Return the operations of a counted step."""
    batch = planned_batch(config, planned_lengths(config, counts.samples), META)
    executed = sum(found.flops for found in counts.operators)
    parts = (student_flops(batch, config), teacher_flops(batch, config), loss_flops(batch, config, counts.world_size))
    return StepOperations(*parts, executed)


def states_of(parts: Iterable[tuple[str, int]]) -> int:
    """Return the bytes of a rank's memory that do not grow with its samples."""
    return sum(nbytes for owner, nbytes in parts if owner not in ("batch", "activations", "scratch"))


def _with_recompute(config: RunConfig, every: int) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"recompute": every})})


def _two_sizes(samples: int, micro_batches: int) -> tuple[int, int]:
    """Return two numbers of samples, of which memory at all others follows: it grows by so much for each sample."""
    least = max(1, -(-min(FEWEST, samples) // micro_batches)) * micro_batches
    return least, 2 * least


def _largest(counts: Sequence[Counts], free: float, micro_batches: int) -> int | None:
    """Return the most samples whose peak fits into so many bytes: the line through two counts."""
    small, large = counts
    growth = (large.peak.peak - small.peak.peak) / (large.samples - small.samples)
    if growth <= 0:
        raise UserError(f"plan: the peak does not grow from {small.samples} to {large.samples} samples a rank")
    most = int(small.samples + (free - small.peak.peak) / growth) // micro_batches * micro_batches
    return most if most > 0 else None


def _purpose(exchange: Exchange, counts: Counts) -> str:
    """Name what a collective is for."""
    if exchange.phase == "loss":
        return "loss: columns, statistics, gradients"
    if exchange.phase == "refresh":
        return "teacher's weights"
    if exchange.phase == "backward" and exchange.kind != "all_gather":
        return f"gradients, {exchange.dtype} {exchange.kind.replace('_', '-')}"
    if exchange.phase == "teacher":
        return "teacher's weights, gathered for its forward"
    if exchange.phase == "update" and exchange.nbytes <= 4:
        return "norm of the gradient"
    if exchange.phase == "update" and exchange.dtype == "float32" and counts.precision != "fp32":
        return "norms and scales in fp32"
    if exchange.phase == "update":
        return "student's weights"
    return "student's weights, gathered for forward and backward"


def may_overlap(exchange: Exchange, stage: int) -> bool:
    """Tell whether a collective runs beside other work of the device; all others are waited for at once.

    Gradients and gathers of stage 3 are begun while the phase's products go on, and so have the rest of them. The
    teacher's refresh runs until the teacher's next use.
    """
    gathers = stage == 3 and exchange.kind == "all_gather" and exchange.phase in ("student", "teacher", "backward")
    gradients = stage > 0 and exchange.phase == "backward"
    return exchange.phase == "refresh" or gathers or gradients


def _hidden(exchange: Exchange, stage: int) -> float:
    """Return the share of a collective's calls that run beside other work of the device."""
    if exchange.phase == "refresh":
        return 1.0
    if not may_overlap(exchange, stage) or not exchange.done:
        return 0.0
    return sum(done < NEARLY_OVER for done in exchange.done) / len(exchange.done)
