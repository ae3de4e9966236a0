"""Measures a machine: takes steps of a run on it, times each operator of one, and products of many sizes alone.

On CPUs with one thread the clock is the CPU time of the process, so that others' work on the machine does not count.
On a GPU it is the device's own clock. There the device is kept busy before each operator, so that its lateness behind
the host is not measured. The way over GPUs has not been run on one yet.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from cosmos_scale.config import RunConfig
from cosmos_scale.engine.link_times import exchange_times
from cosmos_scale.engine.pair import drawn_pair
from cosmos_scale.engine.ranks import Ranks
from cosmos_scale.loss import CosmosLoss
from cosmos_scale.profiling.calibration import Calibration, ExchangeTime, MeasuredRates, ProductRate, fit_operators
from cosmos_scale.profiling.counts import OperatorCount
from cosmos_scale.profiling.fake_device import OperatorShape, operator_shape
from cosmos_scale.profiling.operators import Count, PhasedMode, count_operator, group_of, short_name
from cosmos_scale.profiling.phased_step import step_in_phases
from cosmos_scale.profiling.planned_batch import planned_batch, planned_lengths
from cosmos_scale.words import counted

WARM_UP, STEPS, NARROW_STEPS = 2, 3, 10
GRID_CPU, GRID_GPU = (64, 256, 1024, 4096), (128, 512, 2048, 8192, 32768)
GRID_MOST = 2**37  # operations of the largest product that is timed, a GPU's; a CPU's: a 32nd
REPEATS = 3
COPIED = 2**26  # bytes of the copy
ONE_DNN = "_linear_pointwise"
BUSY_CYCLES = 400_000  # of a GPU's clock before each operator: longer than the host needs for it


@dataclass(frozen=True)
class _Clock:
    """Tells seconds of a device's work."""

    device: torch.device

    def seconds(self, work: Callable[[], Any], *, busy: bool = True) -> tuple[Any, float]:
        """Do some work; return its result and how long the device took. busy: whether a GPU is kept busy before it."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if busy:
                torch.cuda._sleep(BUSY_CYCLES)
            begin.record()
            output = work()
            end.record()
            end.synchronize()
            return output, begin.elapsed_time(end) / 1e3
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        started = clock()
        return (output := work()), clock() - started


@dataclass
class _OperatorTimer(PhasedMode):
    """Times the operators that run inside it. A context manager. found: what each kind asked for and took."""

    clock: _Clock
    found: dict[tuple[str, OperatorShape, str], tuple[Count, float]] = field(default_factory=dict)
    calls: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        if func.namespace == "c10d" or func.is_view:
            return func(*args, **kwargs)
        output, seconds = self.clock.seconds(lambda: func(*args, **kwargs))
        count = count_operator(func, args, kwargs, output)
        if count is not None:
            name = short_name(func)
            shape, dtype, flops = operator_shape(name, func, args, kwargs)
            if flops:
                count = count._replace(flops=flops)
            before, spent = self.found.get((name, shape, dtype), (Count(), 0.0))
            self.found[name, shape, dtype] = before.plus(count), spent + seconds
        return output

    def rows(self) -> Iterator[tuple[OperatorCount, float]]:
        """Yield what was found, as a counted step has it, and its seconds."""
        for (name, shape, dtype), (count, seconds) in self.found.items():
            yield OperatorCount("", group_of(name), name, shape, dtype, *count), seconds


def calibrate(config: RunConfig, samples: int, ranks: Ranks) -> Calibration:
    """Measure this machine with steps of a run, of so many samples a rank. Collective; takes a minute or two.

    The machine should have nothing else to do.
    """
    clock = _Clock(ranks.device)
    timer = _OperatorTimer(clock)
    measured = statistics.median(seconds for seconds, _ in _timed_steps(config, samples, ranks, STEPS, timer))
    rows = list(timer.rows())
    host, narrow = _narrow_step(config, ranks)
    products = tuple(
        ProductRate(name, *point)
        for name, multiply in _multiply_by(timer).items()
        for point in _grid(config, ranks.device, clock, multiply)
    )
    fits = fit_operators([*rows, *narrow], products)
    copied = _copied(ranks.device, clock)
    calibration = Calibration(
        device="cpu" if ranks.device.type == "cpu" else torch.cuda.get_device_name(ranks.device),
        threads=torch.get_num_threads(),
        precision=config.precision,
        fitted_on=f"{config.name}, {counted(samples, 'sample')} a rank",
        products=products,
        fits=fits,
        copied=copied,
        host=host,
        factor=1.0,
        exchanges=tuple(ExchangeTime(*found) for found in exchange_times(ranks)),
    )
    rates = MeasuredRates(calibration, link=1.0, network=1.0)
    summed = sum(rates.operator_seconds(count, config.precision) for count, _ in rows)
    if ranks.device.type == "cpu":
        summed += host * timer.calls
    # With several ranks a step waits for collectives too; there the sum stands as it is.
    return replace(calibration, factor=measured / summed if ranks.world_size == 1 else 1.0)


def real_steps(config: RunConfig, samples: int, ranks: Ranks, steps: int) -> list[float]:
    """Take steps of so many samples a rank, and return the seconds of each after the first ones. Collective."""
    return [seconds for seconds, _ in _timed_steps(config, samples, ranks, steps, None)]


def _timed_steps(
    config: RunConfig, samples: int, ranks: Ranks, steps: int, timer: "_OperatorTimer | None"
) -> list[tuple[float, float]]:
    """Take steps. Return the seconds and the CPU seconds of each; then take one more, whose operators are timed."""
    train = config.train.model_copy(update={"global_batch": samples * ranks.world_size})
    config = config.model_copy(update={"train": train})
    pair, loss = drawn_pair(config, ranks), CosmosLoss(config.optimizer.gradient_scale, kernels=config.kernels)
    batch, clock = planned_batch(config, planned_lengths(config, samples), ranks.device), _Clock(ranks.device)

    def step() -> None:
        step_in_phases(*pair, loss, batch, lambda _: None)

    for _ in range(WARM_UP):
        step()
    found = []
    for _ in range(steps):
        started = time.process_time()
        _, seconds = clock.seconds(step, busy=False)
        found.append((seconds, time.process_time() - started))
    if timer is not None:
        with timer:
            step()
    pair.close()
    return found


def _narrow_step(config: RunConfig, ranks: Ranks) -> tuple[float, list[tuple[OperatorCount, float]]]:
    """Take steps of the run's depth that hardly compute.

    Return the host's seconds for an operator that it calls, and the operators of one step with their seconds.
    """
    timer = _OperatorTimer(_Clock(ranks.device))
    steps = _timed_steps(_narrow(config), 1, ranks, NARROW_STEPS, timer)
    host = statistics.median(cpu_seconds for _, cpu_seconds in steps)
    if ranks.device.type == "cpu":  # there the host computes too
        measured = statistics.median(seconds for seconds, _ in steps)
        host = max(measured - sum(seconds for _, seconds in timer.rows()), 0.1 * measured)
    return host / timer.calls, list(timer.rows())


def _narrow(config: RunConfig) -> RunConfig:
    tree = config.model_dump(mode="json")
    vision = config.model.vision
    patch, width = vision.patch_size, 8 * config.model.pooler_heads
    tree["model"]["embed_dim"] = width
    tree["model"]["vision"] |= {"image_size": 2 * patch, "width": vision.head_width}
    tree["model"]["text"] |= {"width": width, "heads": 1}
    tree["data"]["views"]["local_size"] = patch
    tree["train"]["micro_batches"] = 1
    return RunConfig.model_validate(tree)


def _multiply_by(timer: _OperatorTimer) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return the operators whose products are timed alone: mm, and oneDNN's where the step has it."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mm": torch.mm}
    if any(name == ONE_DNN for name, _, _ in timer.found):

        def one_dnn(left: Tensor, right: Tensor) -> Tensor:
            output: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
            return output

        found[ONE_DNN] = one_dnn
    return found


def _grid(
    config: RunConfig, device: torch.device, clock: _Clock, multiply: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[tuple[int, int, int, float]]:
    """Time products of a grid of sizes. Yield m, k, n and the operations a second.

    Those that would take too long have the rate of the nearest that does not.
    """
    sizes, most = (GRID_GPU, GRID_MOST) if device.type == "cuda" else (GRID_CPU, GRID_MOST // 32)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    points = list(product(sizes, repeat=3))
    timed = {}
    for m, k, n in points:
        if 2 * m * k * n <= most:
            left = torch.ones((m, k), dtype=dtype, device=device)
            right = torch.ones((n, k), dtype=dtype, device=device).t()
            timed[m, k, n] = 2 * m * k * n / _fastest(partial(multiply, left, right), clock, fresh=True)
    for m, k, n in points:
        nearest = min(timed, key=partial(_steps_between, (m, k, n)))
        yield m, k, n, timed[nearest]


def _steps_between(one: Sequence[int], other: Sequence[int]) -> float:
    return sum(abs(math.log(mine / theirs)) for mine, theirs in zip(one, other, strict=True))


def _copied(device: torch.device, clock: _Clock) -> float:
    """Return the bytes a second of a large copy, read and written."""
    source, target = (torch.ones(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * COPIED / _fastest(lambda: target.copy_(source), clock)


def _fastest(work: Callable[[], Tensor], clock: _Clock, *, fresh: bool = False) -> float:
    """Return the least seconds of some work. fresh: whether caches are filled with other things before."""
    work()
    trash = torch.ones(COPIED // 4 if fresh else 0, device=clock.device)
    found = []
    for _ in range(REPEATS):
        trash.add_(1.0)
        found.append(clock.seconds(work)[1])
    return max(min(found), 1e-7)
