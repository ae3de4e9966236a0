"""The trainer's step and other sides that take the same steps in turns: what is raced, and whether losses agree.

Sides start from the same weights and take the same batches of noise, in float32.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cosmos_scale.batch import Batch
from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.config.shipped import shipped_file
from cosmos_scale.data.jobs import progress_bar
from cosmos_scale.engine.pair import pair_of_models
from cosmos_scale.engine.ranks import Ranks
from cosmos_scale.engine.schedule import ema_momentum, learning_rate
from cosmos_scale.loss import CosmosLoss
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.profiling.flops import step_flops
from cosmos_scale.profiling.planned_batch import GLOBAL_TOKENS, LOCAL_TOKENS
from cosmos_scale.step import train_step
from cosmos_scale.testing.batches import random_batch
from cosmos_scale.testing.published_step import Losses, PublishedStep

TOLERANCE = 1e-4  # of each loss: float32 rounding is below 1e-5
COMPARED_STEPS = 5  # after more steps, rounding may have grown past the tolerance
MATRIX, PRODUCTS = 2048, 2

Side = Callable[[Batch, float, float], Losses]
"""Takes a training step with a batch, a learning rate and a momentum of the average."""


class Case(NamedTuple):
    """A shipped run to take steps of: its name, what differs from it, and how many steps are measured by default."""

    title: str
    run: str
    overrides: tuple[str, ...]
    steps: int


CASES = {
    "vitb32": Case("ViT-B/32, batch 8", "cc3m_vitb32", ("train.global_batch=8",), 5),
    "vitb16": Case("ViT-B/16, batch 4", "cc3m_vitb16", ("train.global_batch=4",), 3),
    "tiny": Case(
        "a tiny model, batch 3",
        "cc3m_vitb32",
        (
            *("train.global_batch=3", "data.views.local_size=32", "model.embed_dim=64"),
            *("model.vision.image_size=64", "model.vision.patch_size=16", "model.vision.width=128"),
            *("model.vision.layers=2", "model.text.width=64", "model.text.heads=2", "model.text.layers=2"),
        ),
        5,
    ),
}


def case_config(case: Case, zero_stage: int = 0) -> RunConfig:
    """Return the run of a case, with a schedule of arbitrary length: no shards are read, which would give the length.

    zero_stage: stage 1 in one process shards nothing, but copies gradients as if it did.
    """
    changes = ("precision=fp32", "train.schedule_steps=100000", f"zero.stage={zero_stage}")
    return load_config(shipped_file(case.run), [*case.overrides, *changes])


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
        self.loss = CosmosLoss(config.optimizer.gradient_scale, kernels=config.kernels)

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


def spread(result: Race, side: str) -> str:
    """Return a side's median and range as text."""
    seconds = result.seconds[side]
    return f"{result.median(side):.3g} s ({min(seconds):.3g} to {max(seconds):.3g})"
