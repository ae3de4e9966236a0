"""The time of a counted step on a cluster, by part, and what it waits for."""

from dataclasses import dataclass, replace

from cosmos_scale.config import RunConfig
from cosmos_scale.profiling.calibration import TOLERANCE, MeasuredRates
from cosmos_scale.profiling.counts import PHASES, Counts, Exchange, OperatorCount
from cosmos_scale.profiling.machine import Machine
from cosmos_scale.profiling.operators import META
from cosmos_scale.profiling.plan import Cluster, count_work, may_overlap
from cosmos_scale.profiling.planned_batch import planned_batch, planned_lengths
from cosmos_scale.profiling.rates import CAUTIOUS, HOPEFUL, MIDDLE, UNCALIBRATED, AssumedRates, Rates

PARTS = ("products", "attention", "element-wise", "loss", "update")
"""What the device computes in a step."""
LIMITS = ("GPU", "CPU", "network", "host dispatch", "data CPUs", "PCIe")
CORE_SAMPLES = 190
"""Samples that one core decodes and crops in a second: benchmarks/loader_workers.py on a quiet EPYC of 2 cores."""
MOST_WORKERS = 8  # loader processes of a rank where data.workers is null


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what takes them.

    device: by PARTS, of the kernels. network, hidden: of the collectives alone, and what of it the device's other work
    hides. host: to launch all of it; serial: whether the host computes too. data: of the loader's processes; in_turn:
    whether these take the cores that compute. copy: of the batch to the device.
    """

    device: dict[str, float]
    network: float
    hidden: float
    host: float
    serial: bool
    data: float
    in_turn: bool
    copy: float

    @property
    def computed(self) -> float:
        """The device's computation."""
        return sum(self.device.values())

    @property
    def exposed(self) -> float:
        """Of the collectives, what nothing hides."""
        return self.network - self.hidden

    @property
    def _longest(self) -> dict[str, float]:
        """What runs side by side: the step takes as long as the longest of these."""
        device = self.computed + self.exposed + (self.host if self.serial else 0.0)
        device += self.data if self.in_turn else 0.0
        return {
            ("CPU" if self.serial else "GPU") if self.computed >= self.exposed else "network": device,
            "host dispatch": 0.0 if self.serial else self.host,
            "data CPUs": 0.0 if self.in_turn else self.data,
            "PCIe": self.copy,
        }

    @property
    def seconds(self) -> float:
        """The step's length."""
        return max(self._longest.values())

    @property
    def limit(self) -> str:
        """What the step waits for, one of LIMITS."""
        return max(self._longest.items(), key=lambda item: item[1])[0]


@dataclass(frozen=True)
class PlannedTime:
    """A step's time as expected, and at both ends of the honest range; needed: operations of a rank's step."""

    expected: StepTime
    fastest: StepTime
    slowest: StepTime
    samples: int
    needed: int
    peak: float

    @property
    def rate(self) -> float:
        """Samples a second and GPU."""
        return self.samples / self.expected.seconds

    @property
    def rates(self) -> tuple[float, float]:
        """The least and the most samples a second and GPU."""
        return self.samples / self.slowest.seconds, self.samples / self.fastest.seconds

    @property
    def mfu(self) -> float:
        """Needed operations over the peak."""
        return self.needed / self.expected.seconds / (self.peak * 1e12)

    @property
    def mfus(self) -> tuple[float, float]:
        """The least and the most share of the peak."""
        least, most = (self.needed / time.seconds / (self.peak * 1e12) for time in (self.slowest, self.fastest))
        return least, most


def rates_of(machine: Machine) -> tuple[Rates, Rates, Rates]:
    """Return a machine's rates: as expected, at best, at worst."""
    if machine.calibration is not None:
        measured = MeasuredRates(machine.calibration, machine.link, machine.network, exposed=MIDDLE.exposed)
        return (
            measured,
            replace(measured, times=1.0 - TOLERANCE, exposed=HOPEFUL.exposed),
            replace(measured, times=1.0 + TOLERANCE, exposed=CAUTIOUS.exposed),
        )
    worst = AssumedRates(machine, CAUTIOUS, times=UNCALIBRATED)
    return AssumedRates(machine, MIDDLE), AssumedRates(machine, HOPEFUL), worst


def planned_time(config: RunConfig, counts: Counts, cluster: Cluster) -> PlannedTime:
    """Return the time of a counted step on a cluster of as many GPUs as the counts have ranks."""
    expected, fastest, slowest = (step_time(config, counts, cluster, rates) for rates in rates_of(cluster.machine))
    needed = count_work(config, counts).needed
    return PlannedTime(expected, fastest, slowest, counts.samples, needed, cluster.machine.peak)


def step_time(config: RunConfig, counts: Counts, cluster: Cluster, rates: Rates) -> StepTime:
    """Return the time of a counted step at these rates."""
    device, by_phase = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PHASES, 0.0)
    for count in counts.operators:
        seconds = rates.operator_seconds(count, counts.precision)
        device[part_of(count)] += seconds
        by_phase[count.phase] += seconds
    shared = _shared(cluster)
    device = {part: shared * seconds for part, seconds in device.items()}
    by_phase = {phase: shared * seconds for phase, seconds in by_phase.items()}
    network, hidden = _network(counts, by_phase, cluster, rates)
    hidden *= 1.0 - rates.exposed
    cores = loaders(config, cluster)
    data = 0.0 if config.data.decoder == "dali" else counts.samples / CORE_SAMPLES / max(1.0, cores)
    copy = batch_bytes(config) * counts.samples / (cluster.machine.pcie * 1e9)
    return StepTime(device, network, hidden, rates.host_seconds(counts), rates.serial, data, cores == 0.0, copy)


def part_of(count: OperatorCount) -> str:
    """Return which of PARTS operators belong to."""
    if count.phase in ("loss", "update", "refresh"):
        return "loss" if count.phase == "loss" else "update"
    return count.group if count.group in ("products", "attention") else "element-wise"


def loaders(config: RunConfig, cluster: Cluster) -> float:
    """Return the cores of a rank that decode and crop: those of its loader processes, as far as there are cores.

    0: all cores of its host compute, and decode and crop in turn with that.
    """
    workers, calibration = config.data.workers, cluster.machine.calibration
    if calibration is not None and not cluster.machine.is_gpu:
        most = min(MOST_WORKERS, int(cluster.cores) - 1) if workers is None else workers
        return float(max(0, min(most, int(cluster.cores - calibration.threads))))
    if workers is not None:
        return min(max(1.0, workers), cluster.cores)
    return max(1.0, min(MOST_WORKERS, cluster.cores - 1))


def _shared(cluster: Cluster) -> float:
    """Return how many times longer a rank computes than alone on its host: other ranks want the same cores."""
    calibration = cluster.machine.calibration
    if calibration is None or cluster.machine.is_gpu:
        return 1.0
    return max(1.0, calibration.threads / cluster.cores)


def _network(counts: Counts, by_phase: dict[str, float], cluster: Cluster, rates: Rates) -> tuple[float, float]:
    """Return the seconds of all collectives alone, and those that other work of the device can hide at best."""
    alone = exposed = 0.0
    for phase in PHASES:
        beside: list[tuple[float, float]] = []
        whole = 0.0
        for exchange in counts.exchanges:
            if exchange.phase != phase:
                continue
            each = rates.exchange_seconds(exchange.kind, exchange.nbytes, cluster.nodes, cluster.gpus)
            whole += each * exchange.calls
            if may_overlap(exchange, counts.stage):
                beside += [(begun, each) for begun in _begun(exchange)]
        alone += whole
        exposed += whole - sum(each for _, each in beside)
        # The teacher's refresh runs beside the next step's student.
        behind = by_phase["student"] if phase == "refresh" else by_phase[phase]
        exposed += _overtime(beside, behind)
    return alone, max(0.0, alone - exposed)


def _begun(exchange: Exchange) -> tuple[float, ...]:
    """Return the share of the other work after which each call begins."""
    return (0.0,) * exchange.calls if exchange.phase == "refresh" else exchange.done or (1.0,) * exchange.calls


def _overtime(calls: list[tuple[float, float]], seconds: float) -> float:
    """Return for how long collectives, one after the other, go on after other work of so many seconds.

    calls: of each, the share of the work after which it may begin, and its own seconds.
    """
    now = 0.0
    for begun, each in sorted(calls):
        now = max(now, begun * seconds) + each
    return max(0.0, now - seconds)


def batch_bytes(config: RunConfig) -> int:
    """Return the bytes of a sample's crops and captions that are copied to the device."""
    batch = planned_batch(config, planned_lengths(config, 1), META)
    return sum(tensor.numel() * tensor.itemsize for tensor in (batch.global_crops, batch.local_crops, batch.captions))
