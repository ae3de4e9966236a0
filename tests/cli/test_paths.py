"""Paths on the command line that no file system takes, for every command."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cosmos_scale.cli import main as cli

LONG = "a" * 5000

WITHOUT_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


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


def without_utf8(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "cosmos_scale.cli", *command],
        env=os.environ | WITHOUT_UTF8,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_names_of_pictures_are_the_same_bytes_in_each_locale(tmp_path: Path) -> None:
    (tmp_path / "été").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "été" / "é.jpg")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": "été/é.jpg", "caption": "a cat"}) + "\n", "utf-8")
    code = (
        "import sys; from pathlib import Path; "
        "from cosmos_scale.evaluation.datasets.captioned_files import open_pairs; "
        "((picture, _),) = open_pairs(Path(sys.argv[1]), None); sys.exit(not Path(picture.path).is_file())"
    )
    environment = os.environ | WITHOUT_UTF8
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "pairs.jsonl"], env=environment, check=False, timeout=60
    )
    assert ended.returncode == 0


@pytest.mark.parametrize("command", ["train", "launch"])
def test_a_path_that_the_locale_cannot_spell_is_one_line(command: str, tmp_path: Path) -> None:
    """A run's YAML is UTF-8, whatever the locale."""
    run = tmp_path / "run.yaml"
    source = f"{{name: a, shards: {tmp_path}/été}}"
    run.write_text(f"extends: cosmos:train/published\noutput: {tmp_path}/été\ndata: {{sources: [{source}]}}\n", "utf-8")
    ended = without_utf8(*command.split(), str(run))
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    rule = "the locale's encoding of paths, ascii, lacks '\\xe9'; rule: choose one that has it, such as LC_ALL=C.UTF-8"
    assert ended.stderr.startswith(f"cosmos-scale {command}: {tmp_path}/\\xe9t\\xe9")
    assert ended.stderr.endswith(f": {rule}\n")
