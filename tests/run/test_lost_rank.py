"""A rank that is killed, wherever the others wait for it: each of them ends, and rank 0 names it on one line."""

import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.cli.main import main
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.engine.ranks import maxima
from cosmos_scale.run.progress import PendingStep
from cosmos_scale.testing.runs import Launched, start, write_run
from tests.run.losing_train import DESTROYED, PLACE, PLACES

SECONDS = 90.0  # from the end of the one rank to the ends of all


@pytest.fixture
def run(tmp_path: Path, scenes: SceneShards, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a few steps that saves after the third of them and then evaluates."""
    monkeypatch.setenv(DESTROYED, str(tmp_path / "destroyed"))
    evaluation = {"kind": "retrieval", "name": "scenes", "shards": str(scenes.gallery), "every": 3}
    return write_run(
        tmp_path,
        scenes,
        train={"global_batch": 12, "schedule_steps": 8, "max_steps": 4},
        checkpoint={"every": 3},
        zero={"stage": 1},
        eval=[evaluation],
    )


def ends_of(launched: Launched) -> tuple[list[int], list[str]]:
    """Wait for the end of the last rank, then for the others within the time; their statuses and lines of errors."""
    launched.wait_until_ended(len(launched.processes) - 1)
    finished = launched.wait(SECONDS)
    return finished.statuses, finished.errors.splitlines()


@pytest.mark.parametrize(
    ("place", "ranks", "workers"),
    [*((place, 3, 0) for place in PLACES), ("step", 2, 0), ("device read", 2, 1)],  # workers are forked, and live on
)
def test_all_others_end_and_name_the_rank_that_is_lost(
    place: str, ranks: int, workers: int, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(PLACE, place)
    with start(run, f"data.workers={workers}", ranks=ranks, program="tests.run.losing_train") as launched:
        statuses, lines = ends_of(launched)
    assert statuses == [1] * (ranks - 1) + [-signal.SIGKILL], lines
    (line,) = lines
    lost = f"rank {ranks - 1} on host {socket.gethostname()} has ended"
    assert f"rank 0 lost contact with another rank: {lost}" in line
    if place == "evaluation":
        assert "newest checkpoint: " in line
        assert "step-00000003" in line
    assert not (tmp_path / "destroyed").exists()


def test_ranks_agree_before_they_read_a_step_of_the_device(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a rank that is lost between two steps is noticed by the agreement; the last step has no other behind it."""
    order: list[str] = []

    def agree(*args: Any) -> Any:
        order.append("agree")
        return maxima(*args)

    def read(self: PendingStep, *args: Any) -> Any:
        order.append(f"read {self.step}")
        return reading(self, *args)

    reading = PendingStep.read
    monkeypatch.setattr("cosmos_scale.run.lookahead.maxima", agree)
    monkeypatch.setattr(PendingStep, "read", read)
    assert main(["train", str(run), "checkpoint.every=0", "eval=[]"]) == 0
    assert order == ["agree", "agree", "read 1", "agree", "read 2", "agree", "read 3", "read 4"]
