"""A rank that alone meets what a user can mend while the others wait for it: all end soon, and rank 0 tells why."""

import socket
from pathlib import Path

import pytest

from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.testing.runs import start, train_to_end, write_run
from tests.run.refusing_train import PLACE, PLACES, REFUSAL

SECONDS = 60.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, scenes: SceneShards) -> Path:
    """A run that has saved a checkpoint."""
    run = write_run(
        tmp_path_factory.mktemp("refused"),
        scenes,
        train={"global_batch": 12, "schedule_steps": 8},
        checkpoint={"every": 2},
    )
    train_to_end(run, "train.max_steps=2").require(0)
    return run


@pytest.mark.parametrize("place", PLACES)
def test_all_ranks_end_and_the_reason_is_told(
    place: str, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(PLACE, place)
    weights = run.parent / "tiny" / "checkpoints" / "step-00000002"
    overrides = (f"init_from={weights}", f"output={tmp_path}", "checkpoint.every=1")
    with start(run, *overrides, ranks=3, program="tests.run.refusing_train") as launched:
        finished = launched.wait(SECONDS)
    lines = [line for line in finished.errors.splitlines() if line.startswith("cosmos-scale")]
    if place == "digest":  # which all ranks agree about
        assert finished.statuses == [2, 2, 2]
        assert lines == [f"cosmos-scale train: {REFUSAL} (rank 2)"]
        return
    assert finished.statuses == [1, 1, 2]
    lost, own = lines
    assert lost.startswith(
        "cosmos-scale train: rank 0 lost contact with another rank: "
        f"rank 2 on host {socket.gethostname()} has ended: {REFUSAL}; newest checkpoint: "
    )
    assert own == f"cosmos-scale train: {REFUSAL}"
