"""The training program, one of whose ranks stays in a step for ever or is slow in each, while the others wait for it.

Or one whose evaluations are slow in each batch, and longer than the watchdog's limit.
"""

import os
import time
from collections.abc import Sequence
from typing import Any

import pytest

from cosmos_scale.cli import main as program
from cosmos_scale.engine.student import Student
from cosmos_scale.evaluation.evaluator import Encoder
from cosmos_scale.run import watchdog
from cosmos_scale.run.evaluations import Evaluations
from cosmos_scale.step import train_step

STEP = 3
LATE = 2.0  # seconds after which a rank that waits hears that another has found the standstill
STAYS = "RANK_THAT_STAYS"  # environment variable; the last rank without it
IN_THE_STEP = "stays in the step"  # what that rank prints
SLOW = "SECONDS_OF_A_SLOW_FORWARD"  # environment variable; without it the rank stays in the step
SLOW_BATCH = "SECONDS_OF_A_SLOW_BATCH"  # environment variable: of evaluations, whose limit is the usual one


def main(argv: Sequence[str]) -> int:
    """Run `cosmos-scale`."""
    last = int(os.environ.get("WORLD_SIZE", "1")) - 1
    stays = int(os.environ.get("RANK", "0")) == int(os.environ.get(STAYS, last))
    slow = os.environ.get(SLOW)
    steps = iter(range(1, 100))

    def step(*args: Any, **keys: Any) -> Any:
        if next(steps) == STEP and stays:
            print(IN_THE_STEP, flush=True)
            time.sleep(3600)
        return train_step(*args, **keys)

    def forward(self: Student, *args: Any) -> Any:
        if stays:
            time.sleep(float(slow or 0))
        return forwarded(self, *args)

    def measure(*args: Any) -> Any:
        watchdog.LONGER = 1.0
        return measured(*args)

    def images(self: Encoder, *args: Any) -> Any:
        time.sleep(float(os.environ[SLOW_BATCH]))
        return encoded(self, *args)

    forwarded, measured, encoded = Student.__call__, Evaluations.run_due, Encoder.images
    with pytest.MonkeyPatch.context() as patch:
        if SLOW_BATCH in os.environ:
            patch.setattr(Evaluations, "run_due", measure)
            patch.setattr(Encoder, "images", images)
        elif slow is None:
            patch.setattr(watchdog, "LOOK", watchdog.LOOK if stays else LATE)
            patch.setattr("cosmos_scale.train.train_step", step)
        else:
            patch.setattr(Student, "__call__", forward)
        return program.main(argv)
