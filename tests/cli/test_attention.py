"""`cosmos-scale attention` on a checkpoint of a real run: pictures, page, table, JSON, refusals."""

import json
import os
import warnings
from pathlib import Path

import pytest

from cosmos_scale.cli import main as cli
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.testing.shard_files import picture


def command(checkpoints: Path, out: Path, *options: str) -> list[str]:
    return ["attention", "--checkpoint", str(checkpoints), "--device", "cpu", "--out", str(out), *options]


def test_samples_of_shards_are_drawn_and_their_share_on_words_is_printed(
    checkpoints: Path, shards: SceneShards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a" / "maps"
    options = ["--data", str(shards.gallery), "--samples", "3"]
    assert cli.main(command(checkpoints, out, *options, "--json")) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3
    assert sorted(path.name for path in out.iterdir()) == [*(f"attention-000{n}.png" for n in "123"), "attention.html"]
    for number, line in enumerate(lines, start=1):
        assert line["checkpoint"] == str(checkpoints / "step-00000002")
        assert line["png"] == str(out / f"attention-{number:04d}.png")
        rows = line["image_weights"]
        assert sum(map(sum, rows)) == pytest.approx(1.0, abs=1e-5)
        assert len(rows) == len(rows[0]) == 8
        weights = [weight for word in line["words"] for weight in word["weights"]]
        assert sum(weights) == pytest.approx(line["share_on_words"], abs=1e-6)
        assert 0 < line["share_on_words"] < 1
        assert "".join(word["word"] for word in line["words"]) == line["caption"].lower().replace(" ", "")
    assert cli.main(command(checkpoints, out, *options, "--weights", "teacher")) == 0
    shown = capsys.readouterr().out
    assert "on words" in shown
    assert str(out / "attention.html") in shown
    assert "teacher of " in (out / "attention.html").read_text()
    assert cli.main(command(checkpoints, out, "--data", str(shards.gallery), "--samples", "2")) == 0
    left = f"--out: {out} still holds 1 file of an earlier command, such as {out / 'attention-0003.png'}"
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("--out")] == [left]


def test_pictures_with_captions_of_the_command_line(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = []
    for number, caption in enumerate(("a red square", "$5 & <more>")):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number, size=(90, 70)))
        pairs += ["--image", str(tmp_path / f"{number}.jpg"), "--caption", caption]
    assert cli.main(command(checkpoints, tmp_path / "maps", *pairs, "--json")) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["image"], line["caption"]) for line in lines] == [("0.jpg", "a red square"), ("1.jpg", "$5 & <more>")]
    assert "&lt;" in (tmp_path / "maps" / "attention.html").read_text()


def test_names_that_no_font_or_formula_has_are_drawn(checkpoints: Path, tmp_path: Path) -> None:
    names = ["a$b_^$.jpg", os.fsdecode(b"caf\xe9.jpg"), "\u7ea2.jpg"]
    pairs: list[str] = []
    for name in names:
        (tmp_path / name).write_bytes(picture(1, size=(90, 70)))
        pairs += ["--image", str(tmp_path / name), "--caption", "a \u7ea2 $_^$ \U0001f389"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main(command(checkpoints, tmp_path / "maps", *pairs, "--json")) == 0
    assert "caf\\udce9.jpg" in (tmp_path / "maps" / "attention.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--image and --data: exactly one of both must be there"),
        (["--image", "BROKEN", "--data", "x"], "--image and --data: exactly one of both must be there"),
        (["--image", "BROKEN"], "--caption: 0 for 1 of --image; rule: one for each picture"),
        (["--image", "BROKEN", "--caption", " "], "--caption: number 1 is empty"),
        (["--image", "BROKEN", "--caption", "caf\udce9"], "--caption: number 1 is 'caf\\udce9', which is no UTF-8"),
        (["--image", "BROKEN", "--caption", "a", "--samples", "3"], "--samples: 3 is for samples of --data"),
        (["--data", "x", "--caption", "a"], "--caption: is for --image"),
        (["--image", "BROKEN", "--caption", "a"], "BROKEN: the picture is not a JPEG, PNG or WebP"),
        (["--image", "missing.jpg", "--caption", "a"], "missing.jpg: the picture cannot be read: No such file"),
        (
            ["--dataset", "coco_val2017", "--data", "nowhere"],
            "NOWHERE: no such folder; rule: coco_val2017 is annotations",
        ),
        (["--dataset", "pairs", "--data", "PAIRS"], "PAIRS: no sample can be used"),
    ],
)
def test_wrong_use_is_refused_in_one_line(
    options: list[str], said: str, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "a.jsonl").write_text('{"image": "broken.jpg", "caption": "a"}\n')
    places = {"BROKEN": tmp_path / "broken.jpg", "PAIRS": tmp_path / "a.jsonl", "NOWHERE": Path("nowhere").absolute()}
    for name, path in places.items():
        options = [str(path) if option == name else option for option in options]
        said = said.replace(name, str(path))
    assert cli.main(command(checkpoints, tmp_path / "maps", *options)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"cosmos-scale attention: {said}")
