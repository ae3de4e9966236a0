"""The trainer's step against the published step restated: time, memory, and the share of what the machine can do.

Both sides start from the same weights and take the same batches in turns, in float32: the trainer through DeepSpeed and
`train_step`, the restatement (cosmos_scale/testing/published_step.py) in plain torch. Their losses must agree. The
share compares the trainer's rate with the rate at which torch.mm multiplies large matrices on this machine. It counts
only operations that a step needs (cosmos_scale/profiling/flops.py). On CPUs the trainer's layers may multiply
faster than torch.mm (kernels/linear.py).
"""

import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/step_speedup.py`

import torch

from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.ranks import Ranks, start_ranks
from cosmos_scale.testing.allocation import peak_bytes
from cosmos_scale.testing.step_race import (
    CASES,
    MATRIX,
    LossesDifferError,
    Side,
    TrainerStep,
    case_config,
    initial_weights,
    race,
    restated_step,
    spread,
    step_inputs,
)

MEASURED = ("vitb32", "vitb16")  # the cases that run where no model is named


def peak_memory(config: RunConfig, build: Callable[[], Side]) -> int:
    """Return the most bytes of tensors that exist at one time while a side is built and takes two steps.

    The optimizer makes its moments in the first step, so only the second step holds everything.
    """

    def run() -> None:
        side = build()
        for inputs in step_inputs(config, 2):
            side(*inputs)
        if isinstance(side, TrainerStep):
            side.close()

    peak = peak_bytes(run)
    gc.collect()
    return peak


def figures(name: str, steps: int | None, zero_stage: int, ranks: Ranks) -> list[Figure]:
    """Measure one of the CASES."""
    case = CASES[name]
    config = case_config(case, zero_stage)
    weights = initial_weights(config)
    peaks = [
        peak_memory(config, lambda: TrainerStep(config, weights, ranks)),
        peak_memory(config, lambda: restated_step(config, weights)),
    ]
    trainer = TrainerStep(config, weights, ranks)
    sides: dict[str, Side] = {"trainer": trainer, "restatement": restated_step(config, weights)}
    result = race(config, sides, steps or case.steps, case.title)
    trainer.close()

    setting = f"{case.title}, float32, ZeRO-{config.zero.stage}, one process"
    gigabytes = " over ".join(f"{peak / 2**30:.2f}" for peak in peaks)
    return [
        Figure(
            f"step_speedup_{name}",
            result.ratio("trainer", "restatement"),
            "times",
            f"{setting}; {spread(result, 'restatement')} over {spread(result, 'trainer')}, "
            f"medians of {len(result.products)} steps in turns",
        ),
        Figure(
            f"sgemm_share_{name}",
            result.sgemm_share("trainer"),
            "of sgemm",
            f"{setting}; {statistics.median(result.flops) / 1e9:.4g} GFLOP needed a step, products of "
            f"{MATRIX} x {MATRIX} run at {result.sgemm_rate() / 1e9:.4g} GFLOP/s",
        ),
        Figure(
            f"step_memory_ratio_{name}",
            peaks[0] / peaks[1],
            "of the restatement",
            f"{setting}; peaks of allocated tensors, weights and states included, {gigabytes} GiB",
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    defaults = ", ".join(f"{case.steps} for {name}" for name, case in CASES.items())
    parser = argument_parser(
        "step_speedup",
        (__doc__ or "").partition("\n")[0],
        ("", "--model vitb32 --steps 9 --threads 2 --json step_speedup.json"),
    )
    parser.add_argument("--model", choices=[*CASES, "all"], default="all", help=f"default: all ({' '.join(MEASURED)})")
    parser.add_argument("--steps", type=int, metavar="N", help=f"measured steps; default: {defaults}")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch; default: all cores, or OMP_NUM_THREADS")
    parser.add_argument("--zero-stage", type=int, choices=(0, 1), default=0, help="of the trainer; default: 0")
    arguments = parser.parse_args(argv)
    for option in ("steps", "threads"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            parser.error(f"--{option}: {value} must be at least 1")
    ranks = start_ranks("cpu")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    names = list(MEASURED) if arguments.model == "all" else [arguments.model]
    try:
        results = [figure for name in names for figure in figures(name, arguments.steps, arguments.zero_stage, ranks)]
    except LossesDifferError as error:
        print(error, file=sys.stderr)
        return 1
    report("A training step against the published step restated", results, arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
