"""The time of a planned step in words and numbers, section by section, in lines of 80 columns."""

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cosmos_scale.profiling.plan import GIB, Plan
from cosmos_scale.profiling.plan_time import PlannedTime, loaders
from cosmos_scale.profiling.remedies import Outlook, Remedy
from cosmos_scale.words import counted, table_row

SHARD_BYTES = 60_000
"""Assumed bytes of a sample in the shards: its JPEG and its captions."""
NAME, CHANGE = 48, 40  # columns
SHOWN = 0.005  # of a gain: less is shown as 0%


@dataclass(frozen=True)
class PlannedRun:
    """A plan with its time. steps: of the whole run; None where the config does not say how long an epoch is."""

    plan: Plan
    time: PlannedTime
    steps: int | None
    remedies: Sequence[Remedy]
    scaling: Sequence[Outlook]

    @property
    def hours(self) -> float | None:
        """The run's length, without restarts, evaluations and checkpoints."""
        return None if self.steps is None else self.steps * self.time.expected.seconds / 3600


def time_lines(run: PlannedRun) -> Iterator[str]:
    """Yield what a step takes, part by part, and what it waits for."""
    time, plan = run.time, run.plan
    machine = plan.cluster.machine
    calibration = machine.calibration
    known = f"calibrated on {calibration.device}" if calibration else "NOT calibrated"
    yield table_row("rates ", known)
    yield f"{'time of a step, ms':<{NAME}}{'expected':>10}{'at best .. worst':>22}"
    for part, seconds in time.expected.device.items():
        yield _row(f"  {part}", seconds, time.fastest.device[part], time.slowest.device[part])
    steps = (time.expected, time.fastest, time.slowest)
    yield _row(f"{machine.chip} computes", *(step.computed for step in steps))
    yield _row("network, alone", *(step.network for step in steps))
    yield _row("  of it hidden", *(step.hidden for step in steps))
    yield _row("host dispatch", *(step.host for step in steps))
    cores = loaders(plan.config, plan.cluster)
    loading = f"{counted(int(cores), 'loader')} a {machine.unit}" if cores else "no core is free, in turn with a step"
    yield _row(f"data CPUs: {loading}", time.expected.data)
    yield _row("PCIe", time.expected.copy)
    yield _row("a step", *(step.seconds for step in steps))
    low, high = time.rates
    rate = f"{time.rate:,.0f} samples/s/{machine.unit} [{low:,.0f} .. {high:,.0f}]"
    mfu = f"MFU {time.mfu:.0%} [{100 * time.mfus[0]:.0f} .. {time.mfus[1]:.0%}]"
    together = f"{time.rate * plan.cluster.world_size:,.0f}/s"
    yield table_row("bottleneck: ", f"{time.expected.limit}; {rate} = {together}; {mfu}")
    yield from _run_lines(run)


def _run_lines(run: PlannedRun) -> Iterator[str]:
    world_size, unit = run.plan.cluster.world_size, run.plan.cluster.machine.unit
    reads = run.time.rate * world_size * SHARD_BYTES / 1e9
    reading = f"reads {reads:,.2f} GB/s of shards at {SHARD_BYTES / 1e3:g} kB a sample (assumed)"
    if run.steps is None or run.hours is None:
        unknown = f"its length is unknown (set data.samples or train.schedule_steps); {reading}"
        yield table_row("the run: ", unknown)
        return
    fastest, slowest = (step.seconds * run.steps / 3600 for step in (run.time.fastest, run.time.slowest))
    steps = counted(run.steps, "step")
    yield table_row(
        "the run: ",
        f"{steps}, {_duration(run.hours)} [{_duration(fastest)} .. {_duration(slowest)}], "
        f"{run.hours * world_size:,.0f} {unit}-hours; {reading}",
    )


def remedy_lines(run: PlannedRun) -> Iterator[str]:
    """Yield what would help, what gains most first, under the verdicts."""
    rate = f"samples/s/{run.plan.cluster.machine.unit}"
    yield f"{'what would help':<{CHANGE - 8}}{rate:>16}{'gain':>6}{'GiB':>7}{'step ms':>9} waits for"
    for verdict, remedies in itertools.groupby(run.remedies, key=lambda remedy: remedy.verdict):
        yield f"  {verdict}:"
        for remedy in remedies:
            outlook, expected = remedy.outlook, remedy.outlook.time.expected
            first, *others = textwrap.wrap(outlook.change, CHANGE - 4, break_on_hyphens=False)
            yield (
                f"    {first:<{CHANGE - 4}}{outlook.time.rate:>8,.0f}{_gain(remedy.gain):>6}"
                f"{outlook.memory / GIB:>7.1f}{1e3 * expected.seconds:>9.1f} {expected.limit}"
            )
            yield from (f"      {line}" for line in others)


def scaling_lines(run: PlannedRun) -> Iterator[str]:
    """Yield samples a second and GPU by ZeRO stage and number of GPUs."""
    sizes = list(dict.fromkeys(outlook.cluster.world_size for outlook in run.scaling))
    machine = run.plan.cluster.machine
    heads = "".join(f"{size:>11,}" for size in sizes)
    yield f"samples/s/{machine.unit} at {run.time.samples:,} a {machine.unit} (the global batch grows)"
    yield f"{f'  {machine.unit}s':<14}{heads}"
    for stage in dict.fromkeys(outlook.stage for outlook in run.scaling):
        row = {outlook.cluster.world_size: outlook for outlook in run.scaling if outlook.stage == stage}
        cells = (f"{row[size].time.rate:,.0f}" if row[size].fits else "no room" for size in sizes)
        yield f"  ZeRO stage {stage}" + "".join(f"{cell:>11}" for cell in cells)
    largest = max(run.scaling, key=lambda outlook: outlook.cluster.world_size).time.expected
    share = largest.device["loss"] / largest.computed
    yield f"  at {counted(sizes[-1], machine.unit)} the loss is {share:.0%} of what the {machine.chip} computes"


def _gain(gain: float) -> str:
    return "0%" if abs(gain) < SHOWN else f"{gain:+.0%}"


def _row(name: str, expected: float, *ends: float) -> str:
    text = f"{name:<{NAME}}{expected * 1e3:>10.1f}"
    return f"{text}{f'{ends[0] * 1e3:.1f} .. {ends[1] * 1e3:.1f}':>22}" if ends else text


def _duration(hours: float) -> str:
    return f"{hours / 24:,.1f} days" if hours >= 48 else f"{hours:,.1f} h"
