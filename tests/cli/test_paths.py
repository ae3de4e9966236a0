"""Paths on the command line that no file system takes, for every command."""

import errno
import os
from pathlib import Path

import pytest
from PIL import Image

from cosmos_scale.cli import main as cli

LONG = "a" * 5000


@pytest.mark.parametrize(
    "command",
    [
        f"data index {LONG}",
        f"data index {LONG}/*.tar --out index",
        f"data verify {LONG}",
        f"data inspect {LONG}",
        f"data build --images {LONG} --captions c.csv --out out",
        f"data build --images . --captions {LONG}.csv --out out",
        f"data prepare dreamlip --captions {LONG}.csv --images . --out out",
        f"checkpoint inspect {LONG}",
        f"report {LONG}",
        f"train {LONG}.yaml --dry-run",
        f"train {LONG} --dry-run",
        f"eval retrieval --checkpoint {LONG} --data shards",
        f"convert --checkpoint {LONG} --which teacher --to hf out",
    ],
)
def test_a_path_that_no_file_system_takes_is_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So is a path that leads through a folder which is closed to the user, where pathlib raises alike."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "File name too long" in errors


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.ENOTCONN])
def test_what_the_system_says_of_a_path_is_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise OSError(number, os.strerror(number), "a/b")

    assert cli.exit_status("cosmos-scale data", command) == 2
    assert capsys.readouterr().err == f"cosmos-scale data: a/b: {os.strerror(number)}\n"


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "denied"), FileNotFoundError(errno.ENOENT, "none", "a")])
def test_other_errors_of_the_system_keep_their_traceback(error: OSError) -> None:
    def command() -> int:
        raise error

    with pytest.raises(type(error)):
        cli.exit_status("cosmos-scale data", command)


def test_names_that_are_no_utf8_are_taken_by_all_data_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / os.fsdecode(b"pictures\xff")
    images.mkdir()
    Image.new("RGB", (64, 64), (9, 90, 9)).save(images / "a.jpg")
    (tmp_path / "rows.csv").write_text("image,caption\na.jpg,a picture\n")
    out, few = str(tmp_path / os.fsdecode(b"shards\xff")), ["--workers", "1"]
    build = ["data", "build", "--images", str(images), "--captions", str(tmp_path / "rows.csv"), "--out", out]
    assert cli.main([*build, *few]) == 0
    assert cli.main(["data", "index", out, *few]) == 0
    assert cli.main(["data", "verify", out, *few]) == 0
    assert cli.main(["data", "inspect", out, "--out", str(tmp_path / "seen"), *few]) == 0
    assert cli.main(["data", "verify", out, "--index", out, *few]) == 0
    assert "1 sample in 1 shard" in capsys.readouterr().out


MISSING = [
    ["data", "index", "nope"],
    ["data", "verify", "nope"],
    ["data", "inspect", "nope"],
    ["data", "build", "--images", "nope", "--captions", "c.csv", "--out", "out"],
    ["data", "build", "--images", ".", "--captions", "nope.csv", "--out", "out"],
    ["data", "prepare", "dreamlip", "--captions", "nope", "--images", ".", "--out", "out"],
    ["data", "prepare", "dreamlip", "--captions", "c.csv", "--images", "nope", "--out", "out"],
    ["checkpoint", "inspect", "nope"],
    ["eval", "retrieval", "--checkpoint", "nope", "--data", "nope"],
    ["report", "nope"],
    ["train", "nope.yaml"],
    ["plan", "own_pictures", "--machine", "nope.json"],
    ["launch", "--hostfile", "nope", "own_pictures"],
    *(
        ["train", "--dry-run", "own_pictures", "device=cpu", f"eval=[{{every: 1, {keys}}}]"]
        for keys in (
            *("kind: classification, data: nope", "kind: classification, dataset: webdataset, data: nope"),
            *("kind: classification, dataset: dtd, data: nope", "kind: retrieval, dataset: coco_val2017, data: nope"),
            "kind: segmentation, images: nope, masks: nope, classes: c.csv",
        )
    ),
]


@pytest.mark.parametrize("command", MISSING, ids=lambda command: " ".join(command)[:70])
def test_a_relative_path_that_is_not_there_is_shown_whole(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.csv").write_text("Image Path,raw_caption\nhttp://h/1.jpg,a cat\n")
    assert cli.main(command) == (0 if "--dry-run" in command else 2)  # a plan refuses nothing for what is not here
    captured = capsys.readouterr()
    assert f"{tmp_path}/nope" in captured.err.replace("\n", "") + "".join(captured.out.split())
