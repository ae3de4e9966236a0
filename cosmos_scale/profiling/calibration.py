"""What was measured on a machine, and how long a counted step takes at these rates.

`calibrate.py` measures it. Records only: nothing here runs anything.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from cosmos_scale.profiling.counts import Counts, OperatorCount

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Size = Annotated[int, Field(gt=0)]
TOLERANCE = 0.15
"""Of a calibrated step's time: benchmarks/plan_time.py holds it on other sizes than those of the calibration."""
LATENCY_SHARE = 0.5
"""Assumed: what each doubling of the nodes beyond those measured adds to the shortest collective, of its time."""


@dataclass(frozen=True)
class ProductRate:
    """Products of [m, k] and [k, n], timed alone: operations a second."""

    m: Size
    k: Size
    n: Size
    flops: Positive


@dataclass(frozen=True)
class ExchangeTime:
    """Collectives of so many ranks on a tensor of so many bytes: seconds of each, alone."""

    kind: str
    world_size: Size
    nbytes: Size
    seconds: Positive


@dataclass(frozen=True)
class Calibration:
    """Rates of a machine, as its own step showed them.

    device: cpu, or the GPU's name. fitted_on: the step that was taken. products: a grid of sizes. product_times: by
    operator, how many times as long as by the grid its products took in the step. attention: by operator, operations a
    second. moved: of all other operators, bytes a second. copied: of a large copy, bytes a second. host: seconds for an
    operator that the host calls, beside the device's work. factor: the step's time over the sum of its parts.
    """

    device: str
    threads: Size
    precision: str
    fitted_on: str
    products: tuple[ProductRate, ...]
    product_times: dict[str, Positive]
    attention: dict[str, Positive]
    moved: dict[str, Positive]
    copied: Positive
    host: Positive
    factor: Positive
    exchanges: tuple[ExchangeTime, ...] = ()

    def __post_init__(self) -> None:
        points = {(point.m, point.k, point.n) for point in self.products}
        sizes = [len({point[axis] for point in points}) for axis in range(3)]
        if not points or math.prod(sizes) != len(points) or len(points) != len(self.products):
            raise ValueError("products: must hold each combination of their sizes m, k and n once")


def grid_rate(grid: Sequence[ProductRate], m: int, k: int, n: int) -> float:
    """Return the operations a second of a product, from those of a grid: linear between its points, in logarithms.

    Sizes outside of the grid count as its nearest.
    """
    axes = [sorted({getattr(point, axis) for point in grid}) for axis in ("m", "k", "n")]
    known: dict[tuple[int, ...], float] = {(point.m, point.k, point.n): math.log(point.flops) for point in grid}
    corners: list[tuple[tuple[int, ...], float]] = [((), 1.0)]  # of the cell around the point, each with its weight
    for axis, size in zip(axes, (m, k, n), strict=True):
        place = min(max(float(np.interp(math.log(size), np.log(axis), range(len(axis)))), 0.0), len(axis) - 1.0)
        low, share = int(place), place - int(place)
        ends = [(axis[low], 1.0 - share)] + ([(axis[low + 1], share)] if share else [])
        corners = [((*corner, end), weight * part) for corner, weight in corners for end, part in ends]
    return math.exp(sum(weight * known[corner] for corner, weight in corners))


@dataclass(frozen=True)
class MeasuredRates:
    """A calibrated machine's rates; `times`: how many times as long all of it may take, for the ends of a range.

    link, network: GB/s of a GPU in one direction, where collectives of that many ranks were not measured.
    """

    calibration: Calibration
    link: float
    network: float
    times: float = 1.0
    exposed: float = 1.0

    @property
    def serial(self) -> bool:
        """On CPUs the host is the device."""
        return self.calibration.device == "cpu"

    def operator_seconds(self, count: OperatorCount, precision: str) -> float:
        """Return the device's seconds for operators that are alike."""
        found = self.calibration
        if count.group == "products" and len(count.shape) == 4:
            rate = grid_rate(found.products, *count.shape[1:])
            seconds = count.flops / rate * _of(found.product_times, count.name)
        elif count.group == "attention" and found.attention:
            seconds = count.flops / _of(found.attention, count.name)
        elif count.group == "products":  # the loss's own kernels
            seconds = count.flops / max(point.flops for point in found.products)
        else:
            seconds = count.nbytes / found.moved.get(count.name, found.copied)
        return seconds * found.factor * self.times

    def exchange_seconds(self, kind: str, nbytes: int, nodes: int, gpus: int) -> float:
        """Return a collective's seconds: on the curve of the measured ranks, and by the links beyond them."""
        ranks = nodes * gpus
        if ranks == 1:
            return 0.0
        curve = sorted(
            (point for point in self.calibration.exchanges if point.kind == kind), key=lambda point: point.nbytes
        )
        whole = nbytes * (2 if kind == "all_reduce" else 1)
        across = whole / gpus * (nodes - 1) / nodes / (self.network * 1e9)
        if not curve:
            return self.times * (whole * (gpus - 1) / gpus / (self.link * 1e9) + across)
        measured = max(point.world_size for point in curve)
        curve = [point for point in curve if point.world_size == measured]
        sizes, seconds = [point.nbytes for point in curve], [point.seconds for point in curve]
        alone = float(np.interp(nbytes, sizes, seconds))
        if nbytes > sizes[-1]:
            alone = seconds[-1] * nbytes / sizes[-1]
        alone *= (ranks - 1) / ranks / ((measured - 1) / measured)
        if ranks <= measured:
            return self.times * alone
        return self.times * (alone + across + seconds[0] * LATENCY_SHARE * math.log2(ranks / measured))

    def host_seconds(self, counts: Counts) -> float:
        """Return the host's seconds for all operators that it calls."""
        return self.calibration.host * sum(counts.host_calls.values()) * self.calibration.factor * self.times


def _of(rates: dict[str, float], name: str) -> float:
    """Return an operator's number, or the mean of all where the step had no such operator."""
    return rates[name] if name in rates else sum(rates.values()) / max(1, len(rates))
