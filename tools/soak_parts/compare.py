"""The losses of a disturbed run beside those of undisturbed ones."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from tools.soak_parts.watched import Step

TOLERANCE = 1e-5  # relative, where ranks of another number have added in another order


class Comparison(NamedTuple):
    """What two runs have in common. exact: records that have to be equal bit for bit. near: those within TOLERANCE.

    worst: relative difference of a near record. wrong: what differs too much, as text.
    """

    exact: int
    near: int
    worst: float
    wrong: list[str]


def kept(steps: Sequence[Step]) -> dict[int, Step]:
    """Return the records of the run as it is in the end: of a step that was taken again the last one."""
    found: dict[int, Step] = {}
    for step in steps:
        found = {number: known for number, known in found.items() if number < step.step}
        found[step.step] = step
    return found


def world_sizes(trajectory: Mapping[int, Step]) -> list[tuple[int, int]]:
    """Return the world sizes of a run in their order, each with the last step that it took."""
    groups = groupby(sorted(trajectory.items()), key=lambda item: item[1].world_size)
    return [(size, max(number for number, _ in items)) for size, items in groups]


def compare_with_undisturbed(steps: Sequence[Step], losses: Mapping[int, float], ranks: int) -> Comparison:
    """Compare all records, those of lost steps too, with a run of so many ranks.

    A record is exact where no step before it, in its own past, was taken by another number of ranks.
    """
    other: dict[int, bool] = {}  # by step: whether the weights after it have seen another number of ranks
    exact, near, worst, wrong = 0, 0, 0.0, []
    for step in steps:
        if step.step > 1 and step.step - 1 not in other:
            wrong.append(f"step {step.step} was taken, and no step before it")
        other[step.step] = other.get(step.step - 1, False) or step.world_size != ranks
        difference = _difference(step, losses)
        if other[step.step]:
            near, worst = near + 1, max(worst, difference)
        else:
            exact += 1
        if difference > (TOLERANCE if other[step.step] else 0.0):
            wrong.append(_text(step, losses))
    return Comparison(exact, near, worst, wrong)


def compare_with_replay(trajectory: Mapping[int, Step], losses: Mapping[int, float]) -> Comparison:
    """Compare the run as it is in the end with one of the same world sizes, bit for bit."""
    wrong = [_text(step, losses) for step in trajectory.values() if _difference(step, losses) > 0.0]
    return Comparison(len(trajectory), 0, 0.0, wrong)


def _difference(step: Step, losses: Mapping[int, float]) -> float:
    loss = losses.get(step.step, math.nan)
    difference = abs(step.loss - loss) / abs(loss)
    return difference if math.isfinite(difference) else math.inf


def _text(step: Step, losses: Mapping[int, float]) -> str:
    loss = losses.get(step.step)
    return f"step {step.step} on {step.world_size} ranks (start {step.attempt}): loss {step.loss!r}, not {loss!r}"
