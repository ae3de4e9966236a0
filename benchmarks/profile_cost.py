"""What the profiler's marks cost a step: the host's time with marks and without, in turns, and the time of one phase.

The model has the real depth and is so narrow that the computation hardly counts, as in host_time.py: there marks cost
the largest part of a step. One process plays rank 0 of eight (torch's fake process group), on a CPU. The figures are
CPU time of the process, which others on the machine disturb least.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/profile_cost.py`

from benchmarks.host_time import WORLD_SIZE, narrow_config, trainer_step
from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.phases import listening, phase
from cosmos_scale.profiling.fake_ranks import start_fake_ranks
from cosmos_scale.profiling.step_clock import StepClock
from cosmos_scale.testing.ranks import run_ranks

STAGE, WARM_UP, STEPS, PHASES = 1, 4, 40, 20_000


class Cost(NamedTuple):
    """CPU milliseconds of a step with marks and without, medians.

    marks_ms: of a step's marks by the time of one. share: how much longer the step with marks is than the one beside
    it, the median. heard, unheard: microseconds of a phase that is timed, and of one that is not.
    """

    marked_ms: float
    plain_ms: float
    marks_ms: float
    share: float
    heard: float
    unheard: float


def measure(rank: int, world_size: int, steps: int) -> Cost:
    """Measure the cost; in a process of its own."""
    step, clock = trainer_step(narrow_config(STAGE), start_fake_ranks(WORLD_SIZE)), StepClock(on_gpu=False)
    marked: list[float] = []
    plain: list[float] = []
    for number in range(WARM_UP + steps):
        for with_marks in (number % 2 == 0, number % 2 == 1):
            start = time.process_time()
            if with_marks:
                clock.measure(step)
            else:
                step()
            if number >= WARM_UP:
                (marked if with_marks else plain).append(1e3 * (time.process_time() - start))
    marks_ms = clock.marks_ms()
    shares = [one / other - 1.0 for one, other in zip(marked, plain, strict=True)]
    times = []

    def phases() -> None:
        start = time.process_time()
        for _ in range(PHASES):
            with phase("student"):
                pass
        times.append(1e6 * (time.process_time() - start) / PHASES)

    phases()
    with listening(clock):
        clock.measure(phases)
    medians = statistics.median(marked), statistics.median(plain)
    return Cost(*medians, marks_ms, statistics.median(shares), times[1], times[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argument_parser("profile_cost", (__doc__ or "").partition("\n")[0], ("", "--steps 100"))
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"default: {STEPS}")
    arguments = parser.parse_args(argv)
    (cost,) = run_ranks(measure, 1, arguments.steps, timeout=600.0)
    beside = f"{cost.marked_ms:.2f} ms with marks, {cost.plain_ms:.2f} without, {100 * cost.share:+.2f} % in pairs"
    figures = [
        Figure(
            "profile_marks",
            100 * cost.marks_ms / cost.plain_ms,
            "%",
            f"a step's marks, of its host time, by the time of a mark; real depth and tiny width; {beside}",
        ),
        Figure("profile_phase", cost.heard, "us", "a phase that is timed: two marks"),
        Figure("profile_phase_unheard", cost.unheard, "us", "a phase that nobody listens to, as in training"),
    ]
    report("Cost of the profiler's marks", figures, arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
