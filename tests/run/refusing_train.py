"""The training program, whose last rank alone meets what a user can mend, at a place where the others wait for it."""

import os
from collections.abc import Sequence
from typing import Any

import pytest

from cosmos_scale.checkpoint.initial import InitialWeights
from cosmos_scale.checkpoint.writer import CheckpointWriter
from cosmos_scale.cli import main as program
from cosmos_scale.errors import UserError
from cosmos_scale.run.run import Run

PLACE = "PLACE_TO_REFUSE_AT"  # environment variable: a key of PLACES
REFUSAL = "a file of this host alone is away"

PLACES: dict[str, tuple[type, str, int]] = {
    "digest": (InitialWeights, "digest", 2),  # the first call is the look before all ranks agree
    "start": (Run, "describe", 1),
    "checkpoint": (CheckpointWriter, "save", 2),
}
"""Where the rank refuses: a class, its method, and at which call."""


def main(argv: Sequence[str]) -> int:
    """Run `cosmos-scale`."""
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    owner, name, number = PLACES[os.environ[PLACE]]
    called = getattr(owner, name)
    calls = 0

    def call(*args: Any, **keys: Any) -> Any:
        nonlocal calls
        calls += 1
        if last and calls == number:
            raise UserError(REFUSAL)
        return called(*args, **keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        return program.main(argv)
