"""How far a planned step's time is from the real step's, on this machine, after calibration on another size.

The machine is calibrated with ViT-B/32 at 2 samples, as `cosmos-scale plan --calibrate` does it. Then steps of other
sizes are counted (no work is done), timed by the calibration, and taken for real. With one thread the clock is the CPU
time of the process, so that others' work on the machine does not count.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/plan_time.py`

import statistics

import torch

from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.profiling.calibrate import calibrate, real_steps
from cosmos_scale.profiling.calibration import TOLERANCE
from cosmos_scale.profiling.fake_run import count_run
from cosmos_scale.profiling.machine import Machine, calibrated_machine
from cosmos_scale.profiling.plan import Cluster
from cosmos_scale.profiling.plan_time import planned_time
from cosmos_scale.testing.step_race import CASES, case_config

FITTED, FITTED_SAMPLES = "vitb32", 2
PLANNED = ("vitb32", "vitb16")


def figure_of(name: str, config: RunConfig, machine: Machine, steps: int) -> Figure:
    """Plan a step and take it; return the error."""
    samples = config.train.global_batch
    counts = count_run(config, 1, samples, as_gpu=False)
    planned = planned_time(config, counts, Cluster(1, 1, machine)).expected
    measured = real_steps(config, samples, start_ranks("cpu"), steps)
    median = statistics.median(measured)
    parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in planned.device.items())
    return Figure(
        f"plan_time_error_{name}",
        planned.seconds / median - 1,
        "of the step",
        f"{CASES[name].title}, float32: planned {planned.seconds:.3g} s ({parts}, host {planned.host:.2f}), measured "
        f"{median:.3g} s ({min(measured):.3g} to {max(measured):.3g}, {steps} steps); allowed: {TOLERANCE:.0%}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argument_parser(
        "plan_time", (__doc__ or "").partition("\n")[0], ("", "--model tiny --json plan_time.json")
    )
    parser.add_argument("--model", choices=[*CASES, "all"], default="all", help=f"default: all ({' '.join(PLANNED)})")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="measured steps (default: 3)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default: 1)")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.threads < 1:
        parser.error("--steps, --threads: must be at least 1")
    ranks = start_ranks("cpu")
    torch.set_num_threads(arguments.threads)
    calibration = calibrate(case_config(CASES[FITTED]), FITTED_SAMPLES, ranks)
    machine = calibrated_machine(calibration)
    names = PLANNED if arguments.model == "all" else (arguments.model,)
    found = [figure_of(name, case_config(CASES[name]), machine, arguments.steps) for name in names]
    factor = Figure(
        "plan_time_factor",
        calibration.factor,
        "times the sum of parts",
        f"{calibration.fitted_on}; what the calibration multiplies all parts with",
    )
    report("A planned step's time against the real step's", [factor, *found], arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
