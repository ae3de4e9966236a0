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
Share = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Size = Annotated[int, Field(gt=0)]
TOLERANCE = 0.15
"""Of a calibrated step's time: benchmarks/plan_time.py holds it on other sizes than those of the calibration."""
LATENCY_SHARE = 0.5
"""Assumed: what each doubling of the nodes beyond those measured adds to the shortest collective, of its time."""


@dataclass(frozen=True)
class ProductRate:
    """Products of [m, k] and [k, n] by an operator, timed alone, operands in no cache: operations a second."""

    operator: str
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
class OperatorFit:
    """An operator's seconds in the step: `first` and `second` times what it was asked for, see `asked_for`."""

    first: Share
    second: Share


@dataclass(frozen=True)
class Calibration:
    """Rates of a machine, as its own step showed them.

    device: cpu, or the GPU's name. fitted_on: the step that was taken. products: a grid of sizes for each of some
    operators, mm among them. fits: of each operator of the step. copied: of a large copy, bytes a second. host: seconds
    for an operator that the host calls, beside the device's work. factor: the step's time over the sum of its parts.
    """

    device: str
    threads: Size
    precision: str
    fitted_on: str
    products: tuple[ProductRate, ...]
    fits: dict[str, OperatorFit]
    copied: Positive
    host: Positive
    factor: Positive
    exchanges: tuple[ExchangeTime, ...] = ()

    def __post_init__(self) -> None:
        for operator in {"mm", *(point.operator for point in self.products)}:
            points = [(point.m, point.k, point.n) for point in self.products if point.operator == operator]
            sizes = [len({point[axis] for point in points}) for axis in range(3)]
            if not points or math.prod(sizes) != len(points) or len(points) != len(set(points)):
                raise ValueError(f"products: of {operator} must hold each combination of their sizes m, k and n once")


def asked_for(count: OperatorCount, products: Sequence[ProductRate]) -> tuple[float, float]:
    """Return what an operator's time hangs on.

    Products: their seconds by the grid, and the bytes that they write, often to fresh memory. Attention: operations,
    and bytes. All others: launches, and bytes.
    """
    if count.group == "products" and len(count.shape) == 4:
        return count.flops / grid_rate(products, count.name, *count.shape[1:]), count.written
    return (count.flops if count.group == "attention" else count.launches), count.nbytes


def fit_operators(
    rows: Sequence[tuple[OperatorCount, float]], products: Sequence[ProductRate]
) -> dict[str, OperatorFit]:
    """Return the fit of each operator to rows of counts and seconds: least squares, without negative shares."""
    by_name: dict[str, list[tuple[OperatorCount, float]]] = {}
    for count, seconds in rows:
        by_name.setdefault(count.name, []).append((count, seconds))
    return {
        name: _fit([asked_for(count, products) for count, _ in found], [seconds for _, seconds in found])
        for name, found in by_name.items()
    }


def _fit(asked: Sequence[tuple[float, float]], seconds: Sequence[float]) -> OperatorFit:
    best, least = OperatorFit(0.0, 0.0), math.inf
    for columns in ([0, 1], [0], [1]):
        chosen = np.array(asked, dtype=np.float64)[:, columns]
        scale = np.maximum(chosen.max(axis=0), 1e-300)
        shares = np.linalg.lstsq(chosen / scale, np.array(seconds), rcond=None)[0] / scale
        missed = float(((chosen @ shares - seconds) ** 2).sum())
        if (shares >= 0).all() and missed < least:
            both = [0.0, 0.0]
            for column, share in zip(columns, shares, strict=True):
                both[column] = float(share)
            best, least = OperatorFit(*both), missed
    return best


def grid_rate(products: Sequence[ProductRate], operator: str, m: int, k: int, n: int) -> float:
    """Return the operations a second of a product, from those of a grid: linear between its points, in logarithms.

    Sizes outside of the grid count as its nearest; operators without a grid as mm.
    """
    grid = [point for point in products if point.operator == operator]
    grid = grid or [point for point in products if point.operator == "mm"]
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
        if count.name in found.fits:
            fit, (first, second) = found.fits[count.name], asked_for(count, found.products)
            return (fit.first * first + fit.second * second) * found.factor * self.times
        # The step had no such operator.
        fastest = max(point.flops for point in found.products)
        return (count.flops / fastest + count.nbytes / found.copied) * found.factor * self.times

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
