"""The training program, whose process dies in the evaluation of a step."""

import os
from collections.abc import Sequence
from typing import Any, NoReturn

import pytest

from cosmos_scale.checkpoint.writer import CheckpointWriter
from cosmos_scale.cli import main as program
from cosmos_scale.run.evaluations import Evaluations

STEP = "STEP_TO_DIE_AT"  # environment variable
DIED = 7  # exit status


def main(argv: Sequence[str]) -> int:
    """Run `cosmos-scale` until the evaluation; a checkpoint that was begun before is whole by then."""
    writers: list[CheckpointWriter] = []

    def save(self: CheckpointWriter, *others: Any) -> None:
        writers.append(self)
        saved(self, *others)

    def run_due(self: Evaluations, step: int, *others: Any, **options: Any) -> None:
        if step == int(os.environ[STEP]):
            die()
        evaluated(self, step, *others, **options)

    def die() -> NoReturn:
        if writers:
            writers[-1].wait()
        os._exit(DIED)

    saved, evaluated = CheckpointWriter.save, Evaluations.run_due
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "save", save)
        patch.setattr(Evaluations, "run_due", run_due)
        return program.main(argv)
