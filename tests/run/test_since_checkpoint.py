"""What has changed since the checkpoint that a run goes on from is told by the launch and by the dry run alike."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cosmos_scale.checkpoint.state import checkpoint_name
from cosmos_scale.cli.main import main
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.run.since_checkpoint import OTHER_SHARDS
from cosmos_scale.testing.runs import last_checkpoint, write_run
from cosmos_scale.testing.shard_files import write_shards
from tests.checkpoint.edit import content_of, rewrite

OWN_SERIES = "another name begins a series of its own"


class Trained(NamedTuple):
    """A run that has taken two steps, with what it read, in a folder of its own."""

    run: Path
    gallery: Path
    train: Path

    @property
    def metrics(self) -> Path:
        return self.run.parent / "tiny" / "metrics.jsonl"


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run, not to be written to."""
    folder = tmp_path_factory.mktemp("once")
    train, gallery = write_shards(folder / "train", [16]), write_shards(folder / "gallery", [4])
    section = {"kind": "retrieval", "every": 1, "shards": str(gallery), "max_samples": 3}
    run = write_run(folder, SceneShards(train, gallery), eval=[section])
    assert main(["train", str(run), "train.max_steps=2"]) == 0
    return folder


@pytest.fixture
def trained(once: Path, tmp_path: Path) -> Trained:
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    train, gallery = tmp_path / "train", tmp_path / "gallery"
    section = {"kind": "retrieval", "every": 1, "shards": str(gallery), "max_samples": 3}
    return Trained(write_run(tmp_path, SceneShards(train, gallery), eval=[section]), gallery, train)


@pytest.fixture
def told(trained: Trained, capfd: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Returns the lines that a dry run tells, once a launch has told the same."""

    def tell(*overrides: str) -> list[str]:
        capfd.readouterr()
        assert main(["train", "--dry-run", str(trained.run), *overrides]) == 0
        table: list[str] = []
        for line in capfd.readouterr().out.splitlines():
            if line[2:16].strip():
                table.append(line)
            elif table:
                table[-1] += " " + line.strip()
        dry = [row[26:] for row in table if row.startswith("  changed       warning   ")]
        assert main(["train", str(trained.run), "train.max_steps=2", *overrides]) == 0
        lines = capfd.readouterr().out.splitlines()
        launched = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
        # The table breaks lines anywhere in a path.
        assert ["".join(line.split()) for line in dry] == ["".join(line.split()) for line in launched]
        return launched

    return tell


def without_galleries(trained: Trained) -> None:
    """As older versions have written checkpoints."""
    content = content_of(last_checkpoint(trained.run))
    del content["state"]["galleries"]
    rewrite(last_checkpoint(trained.run), content)


def test_nothing_is_told_of_a_run_as_it_was(once: Path, trained: Trained, told: Callable[..., list[str]]) -> None:
    assert told() == []
    of_no_number = ["eval.0.batch=2", "eval.0.every=2", "log.every=5"]
    assert told(*of_no_number, "eval.0.captions=raw_caption") == []  # the key that was found
    away = trained.gallery.rename(trained.gallery.with_name("moved"))
    assert told(f"eval.0.shards={away}") == []
    new = {"kind": "retrieval", "name": "new", "every": 1, "shards": str(away)}
    assert told(f"eval={json.dumps([new])}") == []
    without_galleries(trained)
    assert told(f"eval.0.shards={once / 'gallery'}") == []


def test_another_gallery_in_the_series_of_an_evaluator_is_told(
    once: Path, trained: Trained, tmp_path: Path, told: Callable[..., list[str]]
) -> None:
    other = write_shards(tmp_path / "other", [5])
    (line,) = told(f"eval.0.shards={other}", "eval.0.max_samples=null")
    assert line.startswith(f"eval.retrieval: retrieval on {other} (5 samples, index ")
    assert f"), was retrieval on {once / 'gallery'} (3 samples, index " in line
    assert line.endswith("from here on its numbers are of what is now, in the series of before; " + OWN_SERIES)
    for path in trained.gallery.glob("*.tar"):  # under the same name
        path.write_bytes(path.read_bytes().replace(b"sentence", b"SENTENCE"))
    index_shards(str(trained.gallery), None, workers=1, progress=False)
    (line,) = told()
    assert re.fullmatch(r"eval\.retrieval: retrieval on \S+ \((3 .*)\), was retrieval on \S+ \(3 .*\); from .*", line)
    without_galleries(trained)
    (line,) = told(f"eval.0.shards={other}")
    assert line.startswith(f"eval.retrieval: shards: {other}, was {once / 'gallery'}; from here on ")
    lines = trained.metrics.read_text().splitlines(keepends=True)
    trained.metrics.write_text("".join(line for line in lines if '"eval"' not in line))
    assert told(f"eval.0.shards={other}") == []  # it has measured nothing before


def test_another_gallery_is_told_behind_a_launch_without_the_evaluator(
    trained: Trained, tmp_path: Path, told: Callable[..., list[str]]
) -> None:
    assert main(["train", str(trained.run), "train.max_steps=3", "eval=[]"]) == 0
    assert told() == []
    (line,) = told(f"eval.0.shards={write_shards(tmp_path / 'other', [5])}", "eval.0.max_samples=null")
    assert re.fullmatch(r"eval\.retrieval: retrieval on \S+ \(5 samples, .*\), was on 3 samples, .*; from .*", line)


def test_checkpoints_that_are_kept_no_longer_are_told_before_they_go(
    trained: Trained, told: Callable[..., list[str]]
) -> None:
    root = trained.metrics.parent / "checkpoints"
    for step in (3, 4, 5):
        assert main(["train", str(trained.run), "checkpoint.keep_last=9", f"train.max_steps={step}"]) == 0
    steps = [checkpoint_name(step) for step in (2, 3, 4, 5)]
    going = "will be deleted once the next checkpoint is whole; rule: chmod a-w keeps a checkpoint's folder for good"
    assert told("checkpoint.keep_last=2") == [f"checkpoint.keep_last: 2, was 9: {steps[0]}, {steps[1]} {going}"]
    assert told("checkpoint.keep_last=2", "checkpoint.keep_every=1") == []
    assert told("checkpoint.keep_last=4") == []
    assert told("checkpoint.keep_last=1", "checkpoint.keep_every=4") == [
        f"checkpoint.keep_last: 1, was 9 and checkpoint.keep_every: 4, was null: {steps[0]}, {steps[1]} {going}"
    ]
    assert sorted(os.listdir(root)) == steps  # no step was left, so that nothing was saved
    assert main(["train", str(trained.run), "train.max_steps=6", "checkpoint.keep_last=1"]) == 0
    assert os.listdir(root) == [checkpoint_name(6)]


def test_another_kind_and_another_way_to_measure_are_told(
    trained: Trained, tmp_path: Path, told: Callable[..., list[str]]
) -> None:
    content = content_of(last_checkpoint(trained.run))
    masked: dict[str, Any] = {"kind": "segmentation", "name": "retrieval", "every": 1, "dataset": "voc20"}
    content["state"]["config"]["eval"] = [{**masked, "data": "voc"}]
    rewrite(last_checkpoint(trained.run), content)
    (line,) = told()
    assert line.startswith(f"eval.retrieval: retrieval on {trained.gallery} (3 samples, ")
    assert ", was segmentation of voc20 on voc (3 samples, " in line


def test_shards_that_were_written_anew_are_told(trained: Trained, told: Callable[..., list[str]]) -> None:
    for path in trained.train.glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(b"sentence", b"SENTENCE"))
    index_shards(str(trained.train), None, workers=1, progress=False)
    assert told() == [OTHER_SHARDS]


@pytest.mark.parametrize(("kept", "steps"), [(0, "1-2"), (2, "2-2"), (None, "1-2")])
def test_records_that_are_gone_are_told(
    trained: Trained, tmp_path: Path, told: Callable[..., list[str]], kept: int | None, steps: str
) -> None:
    if kept is None:
        trained.metrics.unlink()
    else:
        lines = trained.metrics.read_text().splitlines(keepends=True)
        trained.metrics.write_text("".join(lines[:kept]))
    (line,) = told()
    assert line == (
        f"{trained.metrics}: has no record of steps {steps}, which this run has taken: it was deleted or cut, and "
        "curves lack them"
    )
    # A run in another folder that goes on from the checkpoint has no records of before.
    assert told(f"output={tmp_path / 'new'}", f"resume={last_checkpoint(trained.run)}") == []
