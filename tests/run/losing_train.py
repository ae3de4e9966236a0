"""The training program, whose last rank is killed at a place of the run while the other ranks wait there for it."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch.distributed as dist

from cosmos_scale.checkpoint.writer import CheckpointWriter
from cosmos_scale.cli import main as program
from cosmos_scale.engine import contact
from cosmos_scale.evaluation.evaluator import Encoder
from cosmos_scale.run.progress import PendingStep, Progress
from cosmos_scale.step import train_step

PLACE = "PLACE_TO_DIE_AT"  # environment variable: a key of PLACES
DESTROYED = "FILE_OF_DESTROYED_GROUPS"  # environment variable: gets a letter for each group that a rank destroys
STEP = 3  # the place is in this step, or after it


def die() -> NoReturn:
    """End this process as `kill -9` does, when the others have come to where they wait."""
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def in_the_step(patch: pytest.MonkeyPatch, last: bool) -> None:
    """The others wait in the step's collectives."""
    steps = iter(range(1, 100))

    def step(*args: Any, **keys: Any) -> Any:
        if next(steps) == STEP and last:
            die()
        return train_step(*args, **keys)

    patch.setattr("cosmos_scale.train.train_step", step)


class NeverReady:
    """Stands for a CUDA event behind a collective whose peer has ended."""

    def query(self) -> bool:
        """Whether the event has come."""
        return False


def in_a_device_read(patch: pytest.MonkeyPatch, last: bool) -> None:
    """The others ask whether the device is ready."""

    def read(self: PendingStep, *args: Any) -> Any:
        if self.step == STEP:
            self._copied = NeverReady()  # type: ignore[assignment]
            if last:
                die()
        return reading(self, *args)

    reading = PendingStep.read
    patch.setattr(PendingStep, "read", read)


def in_a_call_that_blocks(patch: pytest.MonkeyPatch, last: bool) -> None:
    """The others wait for the device in a call that asks nothing, as `.item()` does."""

    def after_step(self: Progress, step: int, *args: Any, **keys: Any) -> None:
        if step == STEP:
            if last:
                die()
            time.sleep(3600)
        noted(self, step, *args, **keys)

    noted = Progress.after_step
    patch.setattr(Progress, "after_step", after_step)
    patch.setattr(contact, "SECONDS_TO_END", 1.0)


def in_the_checkpoint(patch: pytest.MonkeyPatch, last: bool) -> None:
    """The others wait for what this rank says of its file."""

    def save(self: CheckpointWriter, *args: Any) -> None:
        if last:
            die()
        saved(self, *args)

    saved = CheckpointWriter.save
    patch.setattr(CheckpointWriter, "save", save)


def in_the_evaluation(patch: pytest.MonkeyPatch, last: bool) -> None:
    """The others wait for this rank's features."""

    def texts(self: Encoder, *args: Any) -> Any:
        if last:
            die()
        return encoded(self, *args)

    encoded = Encoder.texts
    patch.setattr(Encoder, "texts", texts)


def before_the_groups(patch: pytest.MonkeyPatch, last: bool) -> None:
    """The others have met this rank, and wait for it in torch's store."""

    def join(*args: Any, **keys: Any) -> None:
        if last:
            die()
        joined(*args, **keys)

    joined = dist.init_process_group
    patch.setattr(dist, "init_process_group", join)
    patch.setattr(contact, "SECONDS_TO_END", 1.0)


PLACES: dict[str, Callable[[pytest.MonkeyPatch, bool], None]] = {
    "step": in_the_step,
    "device read": in_a_device_read,
    "blocking call": in_a_call_that_blocks,
    "checkpoint": in_the_checkpoint,
    "evaluation": in_the_evaluation,
    "groups": before_the_groups,
}


def main(argv: Sequence[str]) -> int:
    """Run `cosmos-scale`."""
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)

    def destroy(*args: Any) -> None:
        with Path(os.environ[DESTROYED]).open("a") as file:
            file.write("x")
        destroyed(*args)

    destroyed = dist.destroy_process_group
    patch = pytest.MonkeyPatch()  # to the process's end
    patch.setattr(dist, "destroy_process_group", destroy)
    PLACES[os.environ[PLACE]](patch, last)
    return program.main(argv)
