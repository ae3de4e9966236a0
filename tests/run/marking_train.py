"""The training program, each rank of which shows by a file that it is at a place of the run, and stays there.

It goes on once a further file says that the test has signalled.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.checkpoint.writer import CheckpointWriter
from cosmos_scale.cli import main as program
from cosmos_scale.engine import ranks
from cosmos_scale.run import start
from cosmos_scale.run.evaluations import Evaluations

PLACE = "PLACE_TO_MARK"  # environment variable: a key of PLACES
MARKS = "MARK_FILES"  # environment variable: the files' path, without the rank, or `signalled` for that of the test
STAY = 60.0  # seconds at the place, at most

PLACES: dict[str, tuple[Any, str]] = {
    "start of ranks": (ranks, "_join"),
    "opening": (start, "_prepare_folder"),
    "save": (CheckpointWriter, "save"),
    "evaluation": (Evaluations, "_measure"),
}


def main(argv: Sequence[str]) -> int:
    """Run `cosmos-scale`."""
    owner, name = PLACES[os.environ[PLACE]]
    mark = Path(f"{os.environ[MARKS]}-{os.environ['RANK']}")
    signalled = Path(f"{os.environ[MARKS]}-signalled")
    original = getattr(owner, name)

    def marked(*args: Any, **keys: Any) -> Any:
        if not mark.exists():
            mark.touch()
            until = time.monotonic() + STAY
            while not signalled.exists() and time.monotonic() < until:
                time.sleep(0.01)
        return original(*args, **keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, marked)
        return program.main(argv)
