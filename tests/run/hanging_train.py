"""The training program, whose last rank stays in a step for ever while the others wait in its collectives."""

import os
import time
from collections.abc import Sequence
from typing import Any

import pytest

from cosmos_scale.cli import main as program
from cosmos_scale.step import train_step

STEP = 3


def main(argv: Sequence[str]) -> int:
    """Run `cosmos-scale`."""
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    steps = iter(range(1, 100))

    def step(*args: Any, **keys: Any) -> Any:
        if next(steps) == STEP and last:
            time.sleep(3600)
        return train_step(*args, **keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cosmos_scale.train.train_step", step)
        return program.main(argv)
