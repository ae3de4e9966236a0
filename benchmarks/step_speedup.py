"""The trainer's step against the published step restated: time, memory, and the share of what the machine can do.

Both sides start from the same weights and take the same batches in turns, in float32: the trainer through DeepSpeed and
`train_step`, the restatement (cosmos_scale/testing/published_step.py) in plain torch. Their losses must agree. The
share compares the trainer's rate with the rate at which torch.mm multiplies large matrices on this machine. It counts
only operations that a step needs (benchmarks/needed_flops.py). On CPUs the trainer's layers may multiply faster than
torch.mm (kernels/linear.py).
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/step_speedup.py`

import torch
from torch import Tensor

from benchmarks.needed_flops import step_flops
from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.batch import Batch
from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.data.jobs import progress_bar
from cosmos_scale.engine.pair import pair_of_models
from cosmos_scale.engine.ranks import Ranks, start_ranks
from cosmos_scale.engine.schedule import ema_momentum, learning_rate
from cosmos_scale.loss import CosmosLoss
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.step import train_step
from cosmos_scale.testing.allocation import peak_bytes
from cosmos_scale.testing.batches import random_batch
from cosmos_scale.testing.published_step import Losses, PublishedStep

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "run"
GLOBAL_TOKENS, LOCAL_TOKENS = (20, 75), (8, 28)  # of captions, both ends included
TOLERANCE = 1e-4  # of each loss: float32 rounding is below 1e-5
COMPARED_STEPS = 5  # after more steps, rounding may have grown past the tolerance
MATRIX, PRODUCTS = 2048, 2

Side = Callable[[Batch, float, float], Losses]
"""Takes a training step with a batch, a learning rate and a momentum of the average."""


class Case(NamedTuple):
    """A run to take steps of: its file, what differs from it, and how many steps are measured by default."""

    title: str
    file: str
    overrides: tuple[str, ...]
    steps: int


CASES = {
    "vitb32": Case("ViT-B/32, batch 8", "cc3m_vitb32.yaml", ("train.global_batch=8",), 5),
    "vitb16": Case("ViT-B/16, batch 4", "cc3m_vitb16.yaml", ("train.global_batch=4",), 3),
    "tiny": Case(
        "a tiny model, batch 3",
        "cc3m_vitb32.yaml",
        (
            *("train.global_batch=3", "data.views.local_size=32", "model.embed_dim=64"),
            *("model.vision.image_size=64", "model.vision.patch_size=16", "model.vision.width=128"),
            *("model.vision.layers=2", "model.text.width=64", "model.text.heads=2", "model.text.layers=2"),
        ),
        5,
    ),
}
MEASURED = ("vitb32", "vitb16")  # the cases that run where no model is named


def case_config(case: Case, zero_stage: int = 0) -> RunConfig:
    """Return the run of a case, with a schedule of arbitrary length: no shards are read, which would give the length.

    zero_stage: stage 1 in one process shards nothing, but copies gradients as if it did.
    """
    changes = ("precision=fp32", "train.schedule_steps=100000", f"zero.stage={zero_stage}")
    return load_config(CONFIGS / case.file, [*case.overrides, *changes])


def step_batch(config: RunConfig, seed: int) -> Batch:
    """Return a batch of noise whose captions are as long as real ones."""
    captions = config.data.captions
    lengths = [GLOBAL_TOKENS] * captions.global_count + [LOCAL_TOKENS] * (captions.count - captions.global_count)
    return random_batch(config.model, config.data.views, config.train.global_batch, lengths, seed=seed)


class TrainerStep:
    """The trainer's own step."""

    def __init__(self, config: RunConfig, weights: Mapping[str, Tensor], ranks: Ranks) -> None:
        model, teacher_model = CosmosModel(config.model), CosmosModel(config.model)
        model.load_state_dict(weights)
        teacher_model.load_state_dict(weights)
        self.pair = pair_of_models(config, ranks, model, teacher_model)
        self.loss = CosmosLoss(config.optimizer.gradient_scale)

    def __call__(self, batch: Batch, lr: float, momentum: float) -> Losses:
        """Train on a batch and return its losses."""
        output = train_step(*self.pair, self.loss, batch, lr=lr, momentum=momentum)
        return Losses(output.total.item(), output.clip.item(), output.distill.item())

    def close(self) -> None:
        """Free the engine, which otherwise keeps itself alive."""
        self.pair.close()


def initial_weights(config: RunConfig) -> dict[str, Tensor]:
    """Return the state dict that every side starts from, student and teacher."""
    model = CosmosModel(config.model)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    return model.state_dict()


def restated_step(config: RunConfig, weights: dict[str, Tensor]) -> PublishedStep:
    """Return the published step restated, for both models' weights."""
    return PublishedStep(config.model, weights, weights, config.optimizer)


class LossesDifferError(Exception):
    """Two sides compute different losses."""


class Race(NamedTuple):
    """Seconds of each side's steps, and of a round's large products; the needed operations of each step."""

    seconds: dict[str, list[float]]
    products: list[float]
    flops: list[int]

    def median(self, side: str) -> float:
        """Return a side's seconds a step."""
        return statistics.median(self.seconds[side])

    def ratio(self, side: str, other: str) -> float:
        """Return how many times longer `other` takes than `side`, from the medians."""
        return self.median(other) / self.median(side)

    def sgemm_rate(self) -> float:
        """Return the operations a second of large products."""
        return PRODUCTS * 2 * MATRIX**3 / statistics.median(self.products)

    def sgemm_share(self, side: str) -> float:
        """Return a side's rate of needed operations, as a share of the rate of large products."""
        rates = [flops / seconds for flops, seconds in zip(self.flops, self.seconds[side], strict=True)]
        return statistics.median(rates) / self.sgemm_rate()


def race(config: RunConfig, sides: Mapping[str, Side], steps: int, label: str) -> Race:
    """Let the sides take the same steps in turns; a first step is not timed.

    Raises LossesDifferError where the losses of the first steps are not the first side's.
    """
    result = Race({name: [] for name in sides}, [], [])
    square = torch.randn(MATRIX, MATRIX, generator=torch.Generator().manual_seed(0))
    with progress_bar(label, steps + 1, show=True) as advance:
        for step, (batch, lr, momentum) in enumerate(step_inputs(config, steps + 1)):
            losses = {}
            # The sides go first by turns, since a side finds in the caches what the side before left there.
            for name in list(sides) if step % 2 else reversed(list(sides)):
                began = time.perf_counter()
                losses[name] = sides[name](batch, lr, momentum)
                result.seconds[name].append(time.perf_counter() - began)
            began = time.perf_counter()
            for _ in range(PRODUCTS):
                torch.mm(square, square)
            result.products.append(time.perf_counter() - began)
            result.flops.append(step_flops(batch, config))
            if step < COMPARED_STEPS:
                compare_losses(losses, next(iter(sides)), step)
            advance(1)
    seconds = {name: times[1:] for name, times in result.seconds.items()}
    return Race(seconds, result.products[1:], result.flops[1:])


def step_inputs(config: RunConfig, steps: int) -> Iterator[tuple[Batch, float, float]]:
    """Yield each step's batch, learning rate and momentum."""
    total = config.total_steps(1)
    for step in range(steps):
        lr, momentum = learning_rate(step, config.optimizer, total), ema_momentum(step, config.ema, total)
        yield step_batch(config, step), lr, momentum


def compare_losses(losses: Mapping[str, Losses], expected: str, step: int) -> None:
    """Raise LossesDifferError where a side's losses of a step are not those of side `expected`."""
    for name, of_side in losses.items():
        for kind, value, wanted in zip(Losses._fields, of_side, losses[expected], strict=True):
            if not abs(value - wanted) <= TOLERANCE:  # so that nan differs
                raise LossesDifferError(
                    f"step {step}: the {kind} loss is {value:.7g} for {name} and {wanted:.7g} for {expected}; "
                    f"they may differ by {TOLERANCE:g}"
                )


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


def spread(result: Race, side: str) -> str:
    """Return a side's median and range as text."""
    seconds = result.seconds[side]
    return f"{result.median(side):.3g} s ({min(seconds):.3g} to {max(seconds):.3g})"


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
    sys.exit(main())
