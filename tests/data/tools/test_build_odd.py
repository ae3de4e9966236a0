"""Rows that nearly name a picture, odd names of files and folders, animated and long pictures, captions of no sign."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cosmos_scale.cli.main import main
from cosmos_scale.data.samples.caption_keys import caption_fault
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.data.tools.build import build_shards
from cosmos_scale.data.tools.build_report import BuildReport
from cosmos_scale.data.tools.captions_file import read_rows
from cosmos_scale.data.tools.near_names import near_names
from cosmos_scale.data.tools.picture_path import picture_path
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import picture

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "my cats").mkdir(parents=True)
    for name in ("0.jpg", "1.jpg", "my cats/2.jpg"):
        (folder / name).write_bytes(picture(ord(name[-5])))
    return folder


def build(images: Path, rows: list[dict[str, object]], out: Path) -> BuildReport:
    captions = images.parent / "captions.jsonl"
    captions.write_text("".join(json.dumps({"caption": "x", **row}) + "\n" for row in rows))
    return build_shards(images, captions, out, samples_per_shard=9, workers=1, progress=False)


def reasons(out: Path) -> list[str]:
    return [json.loads(line)["reason"] for line in (out / "rejected.jsonl").read_text().splitlines()]


def test_a_row_that_nearly_names_a_picture_says_which(images: Path, tmp_path: Path) -> None:
    near = {
        " 0.jpg": "0.jpg",  # a blank behind the comma
        "my cats\\2.jpg": "my cats/2.jpg",
        "my%20cats/2.jpg": "my cats/2.jpg",
        "photos/1.jpg": "1.jpg",  # from the folder above --images
        "https://host/photos/my%20cats/2.jpg": "my cats/2.jpg",
        "C:\\photos\\my cats\\2.jpg": "my cats/2.jpg",
        "photos/my cats/2.JPG": "my cats/2.jpg",
        "0.png": "0.jpg",  # it was converted
    }
    report = build(images, [{"image": name} for name in ("0.jpg", "3.jpg", *near)], tmp_path / "out")
    assert report.samples == 1
    assert dict(report.rejected) == {"picture not found": 1 + len(near)}
    found = [f"picture not found: {name} is there; change the row or --images" for name in near.values()]
    assert reasons(tmp_path / "out") == ["picture not found", *found]
    assert list(near_names("a/b.jpg")) == ["a/b", "b.jpg", "b"]


def test_a_row_that_leads_out_of_the_folder_says_which_picture_in_it_has_its_name(images: Path, tmp_path: Path) -> None:
    names = ["../pictures/my cats/2.jpg", "/data/0.jpg", "../pictures/3.jpg"]
    build(images, [{"image": name} for name in ("0.jpg", *names)], tmp_path / "out")
    outside = f"picture outside the folder: {images} does not hold it"
    ends = [f", but {picture}; change the row or --images" for picture in ("my cats/2.jpg", "0.jpg")]
    assert reasons(tmp_path / "out") == [outside + ends[0], outside + ends[1], outside]


@pytest.mark.parametrize("named", ["7", "07", "7.jpg", "7.0"])
def test_a_number_without_its_zeros_is_told_with_them(images: Path, tmp_path: Path, named: str) -> None:
    """As a spreadsheet, or pandas where a cell is empty, writes the numbers that COCO's pictures are called by."""
    (images / "my cats" / "000000000007.jpg").write_bytes((images / "0.jpg").read_bytes())
    build(images, [{"image": name} for name in ("0.jpg", f"my cats/{named}")], tmp_path / "out")
    (reason,) = reasons(tmp_path / "out")
    assert reason == "picture not found: my cats/000000000007.jpg is there; change the row or --images"


@pytest.mark.parametrize("named", ["x.jpg", "12345.jpg", "12345", "https://host/a/b/c/d/e.jpg"])
def test_a_picture_that_is_not_there_costs_few_looks(images: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    """Millions of rows may have none, on a disk of the network: most of a published set whose links are dead."""
    looks, stat = [], os.stat

    def counting(path: Any, *others: Any, **named: Any) -> os.stat_result:
        looks.append(path)
        return stat(path, *others, **named)

    monkeypatch.setattr(os, "stat", counting)
    with pytest.raises(DamagedSample, match=r"picture not found$"):
        picture_path(images, named)
    assert 0 < len(looks) < 50


@pytest.mark.parametrize(("value", "kind"), [({"path": "0.jpg"}, "object"), (["0.jpg"], "list")])
def test_a_picture_that_is_named_by_no_text_is_of_a_wrong_type(
    images: Path, tmp_path: Path, value: object, kind: str
) -> None:
    build(images, [{"image": "0.jpg"}, {"image": value}], tmp_path / "out")
    assert reasons(tmp_path / "out") == [f"wrong type: the picture is named by a json {kind}, not by a text"]


@pytest.mark.parametrize("name", ["data:v2", "pipe:touch never"])
def test_a_folder_with_a_colon_is_no_url_and_no_command(
    images: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(images.parent)
    assert build(images, [{"image": "0.jpg"}], Path(name)).samples == 1
    assert (images.parent / name / "000000.tar").is_file()
    assert not (images.parent / "never").exists()


def test_a_url_in_the_place_of_a_path_is_refused(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would name a folder of this machine, called s3: or http:."""
    monkeypatch.chdir(images.parent)
    for option in ("--out", "--images", "--captions"):
        paths = {"--images": str(images), "--captions": "c.csv", "--out": "out", option: "s3://user:secret@bucket/x"}
        with pytest.raises(SystemExit) as caught:
            main(["data", "build", *(word for pair in paths.items() for word in pair)])
        assert caught.value.code == 2
        errors = capsys.readouterr().err
        assert errors.endswith(f"error: argument {option}: a URL is given; rule: a path of this machine\n")
        assert "secret" not in errors
    assert not (images.parent / "s3:").exists()


def test_pictures_that_are_encoded_anew_are_counted(images: Path, tmp_path: Path) -> None:
    for name, kind in (("a.png", "PNG"), ("b.webp", "WEBP"), ("c.jpg", "JPEG")):
        (images / name).write_bytes(picture(1, kind))
    rows: list[dict[str, object]] = [{"image": name, "caption": "a"} for name in ("a.png", "b.webp", "c.jpg")]
    report = build(images, rows, tmp_path / "all")
    assert report.converted == 2
    assert "2 PNG or WebP pictures encoded as JPEG of quality 95" in report.describe().splitlines()
    assert "PNG" not in build(images, rows[2:], tmp_path / "jpeg").describe()


def test_animated_pictures_are_counted(images: Path, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    for name in ("a.webp", "b.png"):
        buffer = io.BytesIO()
        frames[0].save(buffer, name[2:].upper(), save_all=True, append_images=frames[1:])
        (images / name).write_bytes(buffer.getvalue())
    frames[0].save(images / "still.png")
    report = build(images, [{"image": name} for name in ("a.webp", "0.jpg", "still.png")], tmp_path / "one")
    assert "1 animated picture: its first frame is packed" in report.describe().splitlines()
    report = build(images, [{"image": name} for name in ("a.webp", "b.png")], tmp_path / "two")
    assert "2 animated pictures: the first frame of each is packed" in report.describe().splitlines()


def test_captions_that_change_while_they_are_read_make_no_finished_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = tmp_path / "captions.jsonl"
    read = read_rows

    def changing(*arguments: Any) -> Any:
        yield from read(*arguments)
        with captions.open("a") as file:
            file.write(json.dumps({"image": "1.jpg", "caption": "y"}) + "\n")

    with monkeypatch.context() as patch:
        patch.setattr("cosmos_scale.data.tools.build.read_rows", changing)
        with pytest.raises(UserError, match=r"captions\.jsonl: has changed while it was read; delete .*out and build"):
            build(images, [{"image": "0.jpg"}], tmp_path / "out")
    with pytest.raises(UserError, match="unfinished `data build`"):
        index_shards(str(tmp_path / "out"), None, progress=False)


def test_a_caption_of_signs_that_show_nothing_is_none(images: Path, tmp_path: Path) -> None:
    invisible = ("\u200b", "\ufeff\u2060 \u00ad", " \u200d")
    shown = ("\U0001f600", "a\u200bb", "\u2014")
    report = build(images, [{"image": "0.jpg", "caption": text} for text in (*invisible, *shown)], tmp_path / "out")
    assert report.samples == len(shown)
    assert reasons(tmp_path / "out") == ["no caption: no sentence in caption"] * len(invisible)
    assert str(caption_fault({"caption": "\u200b"})).startswith("no caption: no sentence in caption")


def test_what_is_no_file_is_named_and_not_called_missing(images: Path, tmp_path: Path) -> None:
    (images / "folder.jpg").mkdir()
    os.mkfifo(images / "fifo.jpg")
    (images / "device.jpg").symlink_to("/dev/zero")
    (images / "link.jpg").symlink_to("nowhere")
    names = ["folder", "fifo", "device", "link"]
    with pytest.raises(UserError, match="no row of 4 can be used"):
        build(images, [{"image": f"{name}.jpg", "caption": "a"} for name in names], tmp_path / "out")
    kinds = ["a folder", "a FIFO", "a device", "a link to what is not there"]
    assert reasons(tmp_path / "out") == [f"picture is {kind}, not a file" for kind in kinds]


def test_a_picture_that_no_jpeg_can_be_costs_its_row(images: Path, tmp_path: Path) -> None:
    """Written as JPEG it ended the build, which could not go on behind it."""
    for name, size in (("wide.png", (65_501, 1)), ("tall.png", (1, 65_501)), ("longest.png", (65_500, 1))):
        Image.new("RGB", size, "red").save(images / name)
    report = build(images, [{"image": name} for name in ("wide.png", "tall.png", "longest.png")], tmp_path / "out")
    assert report.samples == 1
    sizes = ("65501 x 1", "1 x 65501")
    assert reasons(tmp_path / "out") == [
        f"the picture has {size} pixels, and a JPEG at most 65500 on a side" for size in sizes
    ]


def test_a_name_at_the_file_systems_limit_may_lack_its_extension(images: Path, tmp_path: Path) -> None:
    """Of 255 bytes: behind it `.jpeg` and `.webp` make names that no file can have."""
    (images / f"{'a' * 251}.jpg").write_bytes(picture(5))
    Image.new("RGB", (9, 9), "red").save(images / f"{'b' * 251}.png")
    build(images, [{"image": name} for name in ("a" * 251, "b" * 251, "c" * 251, "d" * 256)], tmp_path / "out")
    found = reasons(tmp_path / "out")
    assert found[0] == "picture not found"
    assert found[1].startswith("picture cannot be read: [Errno 36] File name too long")
    assert len(found) == 2


def test_names_in_another_locale_are_the_same_bytes(images: Path, tmp_path: Path) -> None:
    """Without UTF-8 Python looks for the locale's bytes of a name, and found no picture with an accent."""
    (images / "café.jpg").write_bytes(picture(5))
    (tmp_path / "c.csv").write_text("image,caption\ncafé.jpg,a cat\ncafé,a dog\n", encoding="utf-8")
    command = ["data", "build", "--images", str(images), "--captions", str(tmp_path / "c.csv"), "--quiet"]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = subprocess.run(
        [sys.executable, "-m", "cosmos_scale.cli", *command, "--out", str(tmp_path / "out"), "--workers", "1"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    assert reasons(tmp_path / "out") == []
