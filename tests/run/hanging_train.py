"""The training program, whose last rank stays in a step for ever or is slow in each, while the others wait for it."""

import os
import time
from collections.abc import Sequence
from typing import Any

import pytest

from cosmos_scale.cli import main as program
from cosmos_scale.engine.student import Student
from cosmos_scale.step import train_step

STEP = 3
SLOW = "SECONDS_OF_A_SLOW_FORWARD"  # environment variable; without it the rank stays in the step


def main(argv: Sequence[str]) -> int:
    """Run `cosmos-scale`."""
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    slow = os.environ.get(SLOW)
    steps = iter(range(1, 100))

    def step(*args: Any, **keys: Any) -> Any:
        if next(steps) == STEP and last:
            time.sleep(3600)
        return train_step(*args, **keys)

    def forward(self: Student, *args: Any) -> Any:
        if last:
            time.sleep(float(slow or 0))
        return forwarded(self, *args)

    forwarded = Student.__call__
    with pytest.MonkeyPatch.context() as patch:
        if slow is None:
            patch.setattr("cosmos_scale.train.train_step", step)
        else:
            patch.setattr(Student, "__call__", forward)
        return program.main(argv)
