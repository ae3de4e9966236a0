"""The optimizer's step in one process: AdamW and the average of all weights, against two plain forms.

All three update the same tensors, of ViT-B/16 COSMOS's sizes, in turns: 152 million float32 elements in 323 tensors, of
which 108 decay. In one process no other program's load favours a form, and numbers do not depend on the form's order.

- published: torch's AdamW over lists of tensors (foreach), then a loop that moves the average tensor by tensor: the
  published implementation's form.
- fused: torch's fused AdamW, then one call that moves all averages.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/optimizer.py`

import torch
from torch import Size, Tensor, nn
from torch.optim.adamw import adamw

from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.config.load import load_config
from cosmos_scale.config.shipped import shipped_file
from cosmos_scale.data.jobs import progress_bar
from cosmos_scale.engine.optimizer import AdamWEma
from cosmos_scale.model.cosmos import CosmosModel, parameter_decays

ROUNDS = 9
LR, BETAS, EPS, DECAY, MOMENTUM = 5e-4, (0.9, 0.98), 1e-8, 0.5, 0.999


class Group(NamedTuple):
    """Flat tensors of one group, and the same memory cut into the parameters' tensors."""

    weight_decay: float
    flat: dict[str, Tensor]
    cut: dict[str, list[Tensor]]


def model_shapes() -> list[tuple[list[Size], float]]:
    """Return the shapes and the weight decay of both groups of ViT-B/16 COSMOS."""
    with torch.device("meta"):
        model = CosmosModel(load_config(shipped_file("cc3m_vitb16"), ["train.schedule_steps=100000"]).model)
    named = list(model.named_parameters())
    decayed = [parameter.shape for name, parameter in named if parameter_decays(name, parameter)]
    plain = [parameter.shape for name, parameter in named if not parameter_decays(name, parameter)]
    return [(decayed, DECAY), (plain, 0.0)]


def random_groups(shapes: Sequence[tuple[list[Size], float]]) -> list[Group]:
    """Draw weights, gradients, moments and averages."""
    groups = []
    for sizes, weight_decay in shapes:
        counts = [size.numel() for size in sizes]
        flat = {name: torch.rand(sum(counts)) for name in ("weights", "gradients", "first", "second", "averages")}
        cut = {
            name: [part.view(size) for part, size in zip(tensor.split(counts), sizes, strict=True)]
            for name, tensor in flat.items()
        }
        groups.append(Group(weight_decay, flat, cut))
    return groups


def ours(groups: Sequence[Group]) -> Callable[[], None]:
    """Return the trainer's update of one shard a group, as at stages 1 and 2."""
    shards = [nn.Parameter(group.flat["weights"]) for group in groups]
    optimizer = AdamWEma(
        [{"params": [shard], "weight_decay": group.weight_decay} for shard, group in zip(shards, groups, strict=True)],
        betas=BETAS,
        eps=EPS,
        order="before_step",
        triton=False,
    )
    optimizer.adopt([[shard] for shard in shards])
    for shard, group in zip(shards, groups, strict=True):
        names = {"exp_avg": "first", "exp_avg_sq": "second", "ema": "averages"}
        optimizer.state[shard].update({key: group.flat[name] for key, name in names.items()})
    skip = torch.zeros(())

    def step() -> bool:
        optimizer.step_shards([[group.flat["gradients"]] for group in groups])
        return True

    return lambda: optimizer.update(step, lr=LR, momentum=MOMENTUM, skip=skip)


def published(groups: Sequence[Group]) -> Callable[[], None]:
    """Return AdamW over lists, and the average in a loop."""
    adam = _adamw(groups, fused=False)

    @torch.no_grad()
    def update() -> None:
        for group in groups:
            for average, weight in zip(group.cut["averages"], group.cut["weights"], strict=True):
                average.mul_(MOMENTUM).add_((1 - MOMENTUM) * weight)
        adam()

    return update


def fused(groups: Sequence[Group]) -> Callable[[], None]:
    """Return torch's fused AdamW, and the average by one call."""
    adam = _adamw(groups, fused=True)

    @torch.no_grad()
    def update() -> None:
        for group in groups:
            torch._foreach_lerp_(group.cut["averages"], group.cut["weights"], 1 - MOMENTUM)
        adam()

    return update


def _adamw(groups: Sequence[Group], *, fused: bool) -> Callable[[], None]:
    steps = [[torch.zeros(()) for _ in group.cut["weights"]] for group in groups]

    def update() -> None:
        for group, counts in zip(groups, steps, strict=True):
            adamw(
                group.cut["weights"],
                group.cut["gradients"],
                group.cut["first"],
                group.cut["second"],
                [],
                counts,
                foreach=not fused,
                fused=fused,
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=LR,
                weight_decay=group.weight_decay,
                eps=EPS,
                maximize=False,
            )

    return update


FORMS = {"ours": ours, "published": published, "fused": fused}


def seconds(groups: Sequence[Group], rounds: int) -> dict[str, list[float]]:
    """Time every form once a round, so that other programs slow all forms alike; a first round is not counted."""
    updates = {name: form(groups) for name, form in FORMS.items()}
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    with progress_bar("rounds", rounds + 1, show=True) as advance:
        for number in range(rounds + 1):
            for name, update in updates.items():
                began = time.perf_counter()
                update()
                if number > 0:
                    times[name].append(time.perf_counter() - began)
            advance(1)
    return times


def figures(groups: Sequence[Group], rounds: int) -> list[Figure]:
    """Measure the time of an update."""
    times = seconds(groups, rounds)
    medians = {name: statistics.median(of_form) for name, of_form in times.items()}
    elements = sum(group.flat["weights"].numel() for group in groups)

    def spread(name: str) -> str:
        return f"{medians[name]:.3g} s ({min(times[name]):.3g} to {max(times[name]):.3g})"

    def ratio(name: str, other: str, form: str) -> Figure:
        note = (
            f"{elements / 1e6:.1f} million elements, AdamW and average, float32; medians of {rounds} rounds in turns, "
        )
        return Figure(name, medians["ours"] / medians[other], form, f"{note}{spread('ours')} over {spread(other)}")

    return [
        ratio("optimizer_time_ratio", "published", "of AdamW (foreach) and the published loop"),
        ratio("optimizer_time_ratio_fused", "fused", "of torch's fused AdamW and foreach lerp"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argument_parser("optimizer", (__doc__ or "").partition("\n")[0], ("", "--rounds 21 --json optimizer.json"))
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"measured rounds; default: {ROUNDS}")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds: {arguments.rounds} must be at least 1")
    report("The optimizer's step", figures(random_groups(model_shapes()), arguments.rounds), arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
