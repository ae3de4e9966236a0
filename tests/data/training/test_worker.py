"""What a loader process says where its training process has been killed: nothing."""

import os

import pytest

from cosmos_scale.data.training.worker import show_unless_left


@pytest.mark.parametrize(
    ("parent", "error", "shown"),
    [
        (os.getppid(), ValueError(), True),
        (os.getppid(), ConnectionResetError(), False),  # the process ends, and its number still stands
        (os.getppid(), EOFError(), False),
        (0, ValueError(), False),
    ],
)
def test_errors_of_a_killed_training_process_are_not_shown(parent: int, error: Exception, shown: bool) -> None:
    seen: list[object] = []
    show_unless_left(parent, lambda *given: seen.append(given), type(error), error, None)
    assert seen == ([(type(error), error, None)] if shown else [])
