"""`cosmos-scale eval segmentation` on the checkpoint of a run of two ranks that evaluates too."""

import json
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.cli import main as cli
from cosmos_scale.data.scenes.scene_shards import build_scenes
from cosmos_scale.testing.runs import last_checkpoint, records, train_to_end, write_run
from tests.evaluation.segmentation.own_set import OwnSet

NUMBERS = ("pictures", "mIoU", "aAcc", "mAcc", "trivial_mIoU", "left_out", "IoU_background", "IoU_cat")


@pytest.fixture(scope="module")
def own_set(tmp_path_factory: pytest.TempPathFactory) -> OwnSet:
    return OwnSet(tmp_path_factory.mktemp("set") / "own")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, own_set: OwnSet) -> Path:
    """A run of two steps on two ranks, evaluated at its end, with one broken mask among the pictures."""
    (own_set.folder / "masks" / "1.png").write_bytes(b"broken")
    scenes = build_scenes(tmp_path_factory.mktemp("scenes"), train=16, gallery=4, workers=1)
    section = own_set.section(csa=True, per_class=True, overlays=2, every=2, name="shapes")
    short = {"train": {"global_batch": 8, "schedule_steps": 2}, "optimizer": {"warmup_steps": 1}}
    path = write_run(tmp_path_factory.mktemp("run"), scenes, eval=[section.model_dump(mode="json")], **short)
    train_to_end(path, ranks=2).require(0)
    return path


def evaluate(own_set: OwnSet, run: Path, *options: str) -> int:
    places = {"--images": "images", "--masks": "masks", "--classes": "names.txt"}
    own = [text for option, name in places.items() for text in (option, str(own_set.folder / name))]
    return cli.main(
        ["eval", "segmentation", "--checkpoint", str(last_checkpoint(run)), "--device", "cpu", *own, *options]
    )


def test_the_command_measures_what_the_run_measured_on_its_ranks(
    run: Path, own_set: OwnSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (measured,) = records(run, kind="eval")
    for which in ("student", "teacher"):
        options = ["--background", "--csa", "--per-class", "--weights", which, "--json"]
        assert evaluate(own_set, run, *options) == 0
        captured = capsys.readouterr()
        printed: dict[str, Any] = json.loads(captured.out)
        assert printed["dataset"] == "own"
        assert printed["csa"] == "yes"
        assert (printed["pictures"], printed["left_out"]) == (4, 1)
        assert "left out: 1.png of" in captured.err
        for name in NUMBERS:
            assert printed[name] == measured[f"shapes/{which}/{name}"]
    drawn = sorted(path.relative_to(run.parent / "tiny").as_posix() for path in run.parent.rglob("*.png"))
    folders = [f"evaluation/shapes/step-00000002/{which}" for which in ("student", "teacher")]
    assert drawn == [f"{folder}/00000-0.png.png" for folder in folders]  # the second picture's mask is broken


def test_the_table_and_the_overlays(
    run: Path, own_set: OwnSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--background", "--weights", "both", "--overlays", "3", "--out", str(tmp_path / "drawn"), "--per-class"]
    assert evaluate(own_set, run, *options) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for said in ("mIoU of all background", "student", "teacher", "4 pictures, 1 left out", "person"):
        assert said in printed
    assert len(list((tmp_path / "drawn").rglob("*.png"))) == 4


def test_pictures_of_an_earlier_command_are_told(
    run: Path, own_set: OwnSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = tmp_path / "drawn"
    for weights, overlays, said in (("both", "3", ""), ("student", "3", "2 files"), ("both", "1", "2 files")):
        options = ["--background", "--weights", weights, "--overlays", overlays, "--out", str(drawn)]
        assert evaluate(own_set, run, *options) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--out: ")]
        first = (
            sorted(drawn.glob("teacher/*.png"))[0] if weights == "student" else sorted(drawn.glob("student/*.png"))[-1]
        )
        told = f"--out: {drawn} still holds {said} of an earlier command, such as {first}"
        assert lines == ([told] if said else [])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--overlays", "2"], "--overlays: 2 needs --out DIR"),
        (["--prob-threshold", "0.2"], "--prob-threshold: 0.2 must be 0 where class 0 is no background"),
        (["--set", "voc22"], "--dataset: voc22 should be 'voc20', 'voc21'"),
        (["--set", "voc20"], "--data: must be given: the folder that holds voc20"),
        (["--names", "wrong"], "--names: wrong should be 'corrected' or 'published'"),
        (["--overlays", "2", "--out", "/dev/null/there"], "name another folder with --out"),
        (["--crop", "-1"], "--crop: -1 should be greater than or equal to 0"),
        (["--crop", "4"], "crop: 4 is smaller than the model's patches of 8 x 8 pixels"),
    ],
)
def test_wrong_options_are_told_in_one_line(
    run: Path, own_set: OwnSet, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(own_set, run, *options) == 2
    errors = capsys.readouterr().err.splitlines()
    assert any(said in line for line in errors), errors
