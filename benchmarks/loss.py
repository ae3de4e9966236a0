"""The multi-pair contrastive loss and its gradients in one process: time and memory against two plain forms.

All three compute the same numbers in float32: the loss of 8 student views against 4 teacher views, 512 samples of width
512 each, its gradients by the student views and by the scale. Teacher views have no gradient, as in training.

- published: two matrix products a pair, a cross-entropy for each, autograd: the published implementation's form.
- transposed: one product a pair, its transpose for the other direction, autograd.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/loss.py`

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.data.jobs import progress_bar
from cosmos_scale.kernels import contrastive_whole
from cosmos_scale.testing.allocation import peak_bytes

V, T, B, E = 8, 4, 512, 512
ROUNDS = 15


class Problem(NamedTuple):
    """students: [V, B, E] and teachers: [T, B, E], normalised. scale: [] factor of the logits."""

    students: Tensor
    teachers: Tensor
    scale: Tensor


class Answer(NamedTuple):
    """The mean over all pairs, [], and its derivatives by the students [V, B, E] and by the scale's logarithm []."""

    loss: Tensor
    by_students: Tensor
    by_log_scale: Tensor


def random_problem(views: int, targets: int, samples: int, width: int) -> Problem:
    """Return features, alike in all views of a sample, and the scale at which training starts."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(samples, width, generator=generator)
    students, teachers = (
        functional.normalize(common + torch.randn(count, samples, width, generator=generator), dim=-1)
        for count in (views, targets)
    )
    return Problem(students, teachers, torch.tensor(1 / 0.07))


def fused(problem: Problem) -> Answer:
    """Use the trainer's form for one rank."""
    students, teachers, scale = problem
    weights = torch.full((len(students), len(teachers)), 1 / (len(students) * len(teachers)), dtype=torch.float64)
    loss, gradients = contrastive_whole.whole_batch(students, teachers, scale, weights, column_gradients=False)
    return Answer(loss, gradients.rows, gradients.log_scale)


def published(problem: Problem) -> Answer:
    """Take two matrix products for each pair."""

    def pair(student: Tensor, teacher: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return scale * student @ teacher.T, scale * teacher @ student.T

    return _by_autograd(problem, pair)


def transposed(problem: Problem) -> Answer:
    """Take one matrix product for each pair."""

    def pair(student: Tensor, teacher: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        logits = scale * student @ teacher.T
        return logits, logits.T

    return _by_autograd(problem, pair)


def _by_autograd(problem: Problem, pair: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Answer:
    """Compute both cross-entropies of every pair from the logits of both directions."""
    students = problem.students.detach().requires_grad_()
    log_scale = problem.scale.log().requires_grad_()
    scale = log_scale.exp()
    labels = torch.arange(students.shape[1])
    losses = []
    for student in students:
        for teacher in problem.teachers:
            by_row, by_column = pair(student, teacher, scale)
            losses.append((functional.cross_entropy(by_row, labels) + functional.cross_entropy(by_column, labels)) / 2)
    loss = torch.stack(losses).mean()
    return Answer(loss.detach(), *torch.autograd.grad(loss, (students, log_scale)))


FORMS: dict[str, Callable[[Problem], Answer]] = {"fused": fused, "published": published, "transposed": transposed}


def seconds(problem: Problem, rounds: int) -> dict[str, list[float]]:
    """Time every form once a round, so that other programs slow all forms alike; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    with progress_bar("rounds", rounds + 1, show=True) as advance:
        for number in range(rounds + 1):
            for name, form in FORMS.items():
                began = time.perf_counter()
                form(problem)
                if number > 0:
                    times[name].append(time.perf_counter() - began)
            advance(1)
    return times


def figures(rounds: int) -> list[Figure]:
    """Measure time and memory."""
    problem = random_problem(V, T, B, E)
    times = seconds(problem, rounds)
    medians = {name: statistics.median(of_form) for name, of_form in times.items()}
    peaks = {name: peak_bytes(partial(FORMS[name], problem)) for name in ("fused", "published")}

    setting = f"{V} student x {T} teacher views, {B} samples of width {E}, float32, forward and gradients"
    in_turns = f"{setting}; medians of {rounds} rounds in turns, "

    def spread(name: str) -> str:
        return f"{medians[name]:.3g} s ({min(times[name]):.3g} to {max(times[name]):.3g})"

    def time_ratio(name: str, other: str) -> Figure:
        note = f"{in_turns}{spread('fused')} over {spread(other)} of the {other} form"
        return Figure(name, medians["fused"] / medians[other], f"of {other}", note)

    memory = f"{peaks['fused'] / 2**20:.1f} over {peaks['published'] / 2**20:.1f} MiB"
    return [
        time_ratio("loss_time_ratio", "published"),
        time_ratio("loss_time_ratio_transposed", "transposed"),
        Figure(
            "loss_memory_ratio",
            peaks["fused"] / peaks["published"],
            "of published",
            f"{setting}; peaks of allocated tensors beside the features, {memory}",
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argument_parser("loss", (__doc__ or "").partition("\n")[0], ("", "--rounds 21 --json loss.json"))
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"measured rounds; default: {ROUNDS}")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds: {arguments.rounds} must be at least 1")
    report("The multi-pair contrastive loss", figures(arguments.rounds), arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
