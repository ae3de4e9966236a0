"""Runs of two ranks whose newest checkpoint is damaged: `resume: auto` goes back, anything else is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cosmos_scale.checkpoint.state import MANIFEST, checkpoints
from cosmos_scale.cli import main as cli
from cosmos_scale.config import RunConfig
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.engine.pair import Pair, drawn_pair
from cosmos_scale.engine.ranks import Ranks
from cosmos_scale.testing.runs import records, train_to_end, write_run

COMPUTED = ("step", "loss", "clip", "distill", "scale", "distill_scale", "grad_norm")
LAST = "fragments-00001.safetensors"  # of the second rank


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, scenes: SceneShards) -> Path:
    """A finished run of two ranks with checkpoints at steps 2, 4, 6 and 8."""
    sections = {"zero": {"stage": 2}, "checkpoint": {"every": 2, "keep_last": 9}}
    run = write_run(tmp_path_factory.mktemp("whole"), scenes, **sections)
    train_to_end(run, ranks=2).require(0)
    return run


def computed(run: Path) -> list[dict[str, float]]:
    return [{key: record[key] for key in COMPUTED} for record in records(run)]


def stopped_at_6(run: Path, folder: Path) -> Path:
    """A copy of the run as it was when its newest checkpoint was that of step 6; returns its YAML file."""
    shutil.copytree(run.parent, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "tiny" / "checkpoints" / "step-00000008")
    return folder / run.name


def flip(path: Path, place: float) -> None:
    """Flip a bit at a place between the file's begin, 0, and its end, 1."""
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "torn: a file lacks": (LAST, lambda path: path.unlink()),
    "torn: the manifest lacks": (MANIFEST, lambda path: path.unlink()),
    "truncated": (LAST, lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "a bit of a file's header length": (LAST, lambda path: flip(path, 0.0)),
    "a bit of a file's middle": ("fragments-00000.safetensors", lambda path: flip(path, 0.5)),
    "a bit of a file's end": (LAST, lambda path: flip(path, 1.0)),
    "a bit of the manifest": (MANIFEST, lambda path: flip(path, 0.3)),
}
QUICK = ("truncated", "a bit of a file's end")


@pytest.mark.parametrize(
    "damage", [damage if damage in QUICK else pytest.param(damage, marks=pytest.mark.slow) for damage in DAMAGES]
)
def test_auto_goes_back_to_the_newest_whole_one_and_says_so(run: Path, tmp_path: Path, damage: str) -> None:
    again = stopped_at_6(run, tmp_path)
    folder = tmp_path / "tiny" / "checkpoints"
    name, damaging = DAMAGES[damage]
    damaging(folder / "step-00000006" / name)
    finished = train_to_end(again, f"output={tmp_path}", "checkpoint.keep_last=2", ranks=2).require(0)
    (line,) = [line for line in finished.output.splitlines() if "passed over" in line]
    assert line.startswith("passed over a broken checkpoint, now step-00000006.broken: ")
    assert name in line
    assert f"resumed from {folder}/step-00000004" in finished.output
    assert computed(again) == computed(run)
    # What is broken counts neither as one of those that are kept nor as the newest, and is left to look at.
    assert [path.name for path in checkpoints(folder)] == ["step-00000006", "step-00000008"]
    assert sorted(path.name for path in folder.iterdir())[1] == "step-00000006.broken"


def test_inspect_tells_a_runs_parts_and_its_place_in_the_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "inspect", str(run.parent / "tiny"), "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["epoch"] for one in found] == [0.2, 0.4, 0.6, 0.8]  # of ten steps
    parts = found[-1]["parameters"]
    assert min(parts.values()) > 0
    assert parts["log-scales"] == 2
    assert found[-1]["bytes"] > 16 * sum(parts.values())


def test_a_broken_one_that_is_asked_for_is_refused(run: Path, tmp_path: Path) -> None:
    again = stopped_at_6(run, tmp_path)
    broken = tmp_path / "tiny" / "checkpoints" / "step-00000006"
    flip(broken / LAST, 0.9)
    for folder in (broken, tmp_path / "tiny"):  # a run's folder means its newest
        finished = train_to_end(again, f"output={tmp_path}/new", f"resume={folder}", ranks=2).require(2)
        assert len(finished.errors.splitlines()) == 1
        assert f"{broken / LAST}: is damaged between bytes" in finished.errors
    assert broken.exists()


def test_a_run_of_broken_checkpoints_is_refused_and_never_begun_anew(run: Path, tmp_path: Path) -> None:
    again = stopped_at_6(run, tmp_path)
    folder = tmp_path / "tiny" / "checkpoints"
    before = computed(again)
    flip(folder / "step-00000006" / LAST, 0.6)  # found when it is loaded
    (folder / "step-00000004" / MANIFEST).unlink()
    (folder / "step-00000002" / LAST).write_bytes(b"")
    finished = train_to_end(again, f"output={tmp_path}", ranks=2).require(2)
    assert len(finished.errors.splitlines()) == 1
    assert f"no checkpoint under {folder} is whole; the newest: checkpoint file" in finished.errors
    assert str(folder / "step-00000006" / LAST) in finished.errors
    assert computed(again) == before
    assert [path.name for path in sorted(folder.iterdir())] == [f"step-0000000{step}" for step in (2, 4, 6)]


def test_a_run_resumed_at_its_start_does_not_write_that_again(tmp_path: Path, scenes: SceneShards) -> None:
    """Killed in between, it would have replaced its only checkpoint by none."""
    run = write_run(tmp_path, scenes, checkpoint={"at_start": True, "every": 0})
    train_to_end(run, "train.max_steps=1").require(0)
    folder = tmp_path / "tiny" / "checkpoints"
    shutil.rmtree(folder / "step-00000001")
    before = (folder / "step-00000000" / MANIFEST).stat().st_mtime_ns
    assert f"resumed from {folder}/step-00000000" in train_to_end(run, "train.max_steps=1").require(0).output
    assert (folder / "step-00000000" / MANIFEST).stat().st_mtime_ns == before
    assert (folder / "step-00000001" / MANIFEST).exists()


@pytest.mark.parametrize(("deleted", "origin"), [([6], "step-00000004"), ([2, 4, 6], "new run")])
def test_a_checkpoint_deleted_after_it_was_found_is_passed_over(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    deleted: list[int],
    origin: str,
) -> None:
    """As by a script that makes room while the run starts."""

    def draw(config: RunConfig, ranks: Ranks) -> Pair:
        for step in deleted:
            shutil.rmtree(tmp_path / "tiny" / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
        return drawn_pair(config, ranks)

    again = stopped_at_6(run, tmp_path)
    monkeypatch.setattr("cosmos_scale.run.start.drawn_pair", draw)
    assert cli.main(["train", str(again), f"output={tmp_path}", "zero.stage=2"]) == 0
    said = capfd.readouterr().out
    assert said.count("passed over one that was deleted meanwhile: checkpoint ") == 1
    assert origin in next(line for line in said.splitlines() if line.startswith(f"{tmp_path}/tiny: "))
    assert [record["step"] for record in records(again)] == list(range(1, 9))
