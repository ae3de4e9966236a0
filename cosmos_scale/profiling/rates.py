"""How long a GPU takes for what a step asks of it: rates that nobody measured here, with the shares of them reached.

Three sets of shares stand for a range: `HOPEFUL`, `CAUTIOUS`, and `MIDDLE` between both.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from cosmos_scale.profiling.counts import Counts, OperatorCount
from cosmos_scale.profiling.machine import Machine

KERNEL_SECONDS = 2e-6
"""Assumed: the least time of a kernel on the device, however little it does."""
HOP_SHARE = 0.5
"""Assumed: what each doubling of the nodes adds to the time that a collective takes beside its bytes, of that time."""
HOST_PER_COLLECTIVE = 6
"""Assumed: a collective costs the host as much as so many launches: DeepSpeed's hooks and bookkeeping in Python."""
UNCALIBRATED = 1.7
"""How many times as long as by cautious shares a step may take that nobody has measured: with it, the range holds the
published shares of the peak of DINOv3 and NeMo's CLIP on H100s (benchmarks/plan_published.py)."""
FP32_SHARE = 0.5
"""Of the bf16 peak: the peak of products in TF32, by NVIDIA's data sheets of A100, H100, H200 and B200."""


class Assumed(NamedTuple):
    """Which shares of a chip's rates are reached.

    products, attention: of the most measured rate of products. memory, traffic: of the data sheets' rates. launch_us:
    the host's time for an operator, in microseconds. collective_us: what a collective takes beside its bytes. exposed:
    the share of the gradients' traffic that the backward does not hide, although it could.
    """

    products: float
    attention: float
    memory: float
    traffic: float
    launch_us: float
    collective_us: float
    exposed: float


HOPEFUL = Assumed(
    products=0.95, attention=0.6, memory=0.9, traffic=0.8, launch_us=8.0, collective_us=20.0, exposed=0.15
)
CAUTIOUS = Assumed(
    products=0.65, attention=0.3, memory=0.7, traffic=0.5, launch_us=18.0, collective_us=60.0, exposed=1.0
)
MIDDLE = Assumed(*(math.sqrt(low * high) for low, high in zip(HOPEFUL, CAUTIOUS, strict=True)))


class Rates(Protocol):
    """Says how long a machine takes."""

    @property
    def serial(self) -> bool:
        """Whether the host computes too, so that its own time comes on top of the device's."""
        ...

    @property
    def exposed(self) -> float:
        """The share of the traffic that other work of the device could hide but does not."""
        ...

    def operator_seconds(self, count: OperatorCount, precision: str) -> float:
        """Return the device's seconds for operators that are alike, in a run of this precision."""
        ...

    def exchange_seconds(self, kind: str, nbytes: int, nodes: int, gpus: int) -> float:
        """Return the seconds of one collective on a tensor of so many bytes, alone, on nodes of so many GPUs."""
        ...

    def host_seconds(self, counts: Counts) -> float:
        """Return the host's seconds for a step."""
        ...


@dataclass(frozen=True)
class AssumedRates:
    """A machine's rates from data sheets, of which shares are reached; the device's work takes `times` as long."""

    machine: Machine
    assumed: Assumed
    times: float = 1.0
    serial: bool = False

    @property
    def exposed(self) -> float:
        """The share of the traffic that other work could hide but does not."""
        return self.assumed.exposed

    def operator_seconds(self, count: OperatorCount, precision: str) -> float:
        """Return the longest of operations, bytes and launches at their rates."""
        share = {"products": self.assumed.products, "attention": self.assumed.attention}.get(count.group, 1.0)
        # The loss's kernels and attention multiply in the run's precision, whatever else they are handed.
        exact = count.dtype == "float32" if count.name in _PLAIN_PRODUCTS else precision == "fp32"
        rate = self.machine.products * 1e12 * share * (FP32_SHARE if exact else 1.0)
        moved = count.nbytes / (self.machine.memory_rate * 1e12 * self.assumed.memory)
        return self.times * max(count.flops / rate, moved, count.launches * KERNEL_SECONDS)

    def exchange_seconds(self, kind: str, nbytes: int, nodes: int, gpus: int) -> float:
        """Return the seconds of three stages: inside the nodes, across them, inside; and of the start."""
        if nodes * gpus == 1:
            return 0.0
        whole = nbytes * (2 if kind == "all_reduce" else 1)
        links = whole * (gpus - 1) / gpus / (self.machine.link * 1e9)
        network = whole / gpus * (nodes - 1) / nodes / (self.machine.network * 1e9)
        start = self.assumed.collective_us / 1e6 * (1 + HOP_SHARE * math.log2(nodes))
        return self.times * ((links + network) / self.assumed.traffic + start)

    def host_seconds(self, counts: Counts) -> float:
        """Return the seconds for which the host launches one operator after the other."""
        launches = sum(counts.launches().values())
        calls = sum(exchange.calls for exchange in counts.exchanges)
        return (launches + HOST_PER_COLLECTIVE * calls) * self.assumed.launch_us / 1e6


_PLAIN_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_linear_pointwise"})
