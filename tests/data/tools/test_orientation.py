"""Pictures that their EXIF tag turns: `data build` against Pillow's own turn, and how they are counted."""

import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from cosmos_scale.cli import main as cli
from cosmos_scale.data.decode.orientation import orientation_of
from cosmos_scale.data.decode.picture import ignore_warnings_of_pillow
from cosmos_scale.data.tools.build import build_shards
from cosmos_scale.data.tools.build_report import BuildReport
from cosmos_scale.data.tools.packed_picture import Orientation
from tests.data.tools.test_build import read_all

QUADRANTS = ((220, 30, 30), (30, 200, 30), (40, 40, 230), (230, 220, 40))


def encoded(kind: str, orientation: int) -> bytes:
    """A picture of 48 x 32 with four colours, and a tag; 0: no tag."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    for place, colour in enumerate(QUADRANTS):
        row, column = divmod(place, 2)
        pixels[16 * row : 16 * row + 16, 24 * column : 24 * column + 24] = colour
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=95, exif=exif.tobytes() if orientation else b"")
    return buffer.getvalue()


def build(folder: Path, data: list[bytes], orientation: Orientation) -> tuple[BuildReport, list[bytes]]:
    (folder / "images").mkdir(exist_ok=True)
    rows = []
    for number, one in enumerate(data):
        (folder / "images" / f"{number}.jpg").write_bytes(one)
        rows.append(json.dumps({"image": f"{number}.jpg", "text": "a"}) + "\n")
    (folder / "rows.jsonl").write_text("".join(rows))
    out = folder / orientation
    report = build_shards(
        *(folder / "images", folder / "rows.jsonl", out),
        samples_per_shard=99,
        orientation=orientation,
        workers=1,
        progress=False,
    )
    return report, [picture for _, (picture, _) in sorted(read_all(out).items())]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_turned_pictures_become_upright(tmp_path: Path, kind: str) -> None:
    data = [encoded(kind, orientation) for orientation in range(1, 9)]
    report, made = build(tmp_path, data, "upright")
    assert report.turned == 7
    assert "7 pictures turned upright (--orientation keep leaves them)" in report.describe()
    for before, after in zip(data, made, strict=True):
        wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(before))).convert("RGB")
        found = Image.open(io.BytesIO(after))
        assert found.size == wanted.size
        assert orientation_of(after) == 1
        # Quality 95 of flat quadrants: a few levels, more at their edges, whose places the mean of |difference| weighs.
        difference = np.asarray(found, np.float64) - np.asarray(wanted, np.float64)
        assert np.abs(difference).mean() < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_kept_pictures_keep_their_pixels_and_the_tag(tmp_path: Path, kind: str) -> None:
    data = [encoded(kind, 6), encoded(kind, 1), encoded(kind, 0)]
    report, made = build(tmp_path, data, "keep")
    assert [orientation_of(one) for one in made] == [6, 1, 1]
    assert "1 picture with a tag that says to turn it" in report.describe()
    assert all(Image.open(io.BytesIO(one)).size == (48, 32) for one in made)
    if kind == "JPEG":
        assert made == data


def test_other_pictures_keep_their_bytes_and_are_not_counted(tmp_path: Path) -> None:
    data = [encoded("JPEG", 1), encoded("JPEG", 0), encoded("JPEG", 9)]  # 9 is no orientation
    report, made = build(tmp_path, data, "upright")
    assert made == data
    assert report.turned == 0
    assert "turn" not in report.describe()


def test_inspect_and_verify_count_turned_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path, [encoded("JPEG", 6), encoded("JPEG", 3), encoded("JPEG", 1)], "keep")
    for command, said in (
        (["verify"], "2 pictures with an EXIF tag that turns them, which training ignores"),
        (["inspect", "--out", str(tmp_path / "seen")], "2 with an EXIF tag that turns them, which training ignores"),
    ):
        assert cli.main(["data", *command, str(tmp_path / "keep"), "--quiet", "--workers", "1"]) == 0
        assert said in capsys.readouterr().out


def test_broken_tags_say_nothing_of_pillows_files() -> None:
    """Pillow would warn of a tag that breaks off, and name a line of its own."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert orientation_of(buffer.getvalue()) == 1
        assert "Corrupt EXIF data" in str(seen[0].message)
        seen.clear()
        ignore_warnings_of_pillow()
        assert orientation_of(buffer.getvalue()) == 1
        assert seen == []
