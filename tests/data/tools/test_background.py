"""Transparent pictures in `data build`: what stands behind them, and how they are counted."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosmos_scale.data.decode.picture import decode_rgbx
from cosmos_scale.data.tools.build import build_shards
from cosmos_scale.data.tools.build_report import BuildReport
from cosmos_scale.errors import UserError
from tests.data.tools.test_build import read_all

HIDDEN, HALF = (200, 10, 10), 128


def encoded(kind: str) -> bytes:
    """A red picture of 32 x 32, whose left half is transparent."""
    buffer = io.BytesIO()
    alpha = np.full((32, 32), 255, np.uint8)
    alpha[:, :16] = HALF if kind == "half" else 0
    red = np.dstack([np.full((32, 32), level, np.uint8) for level in HIDDEN] + [alpha])
    if kind in ("PNG", "WEBP", "half"):
        # exact: WebP keeps the colours of transparent pixels.
        Image.fromarray(red).save(buffer, "WEBP" if kind == "WEBP" else "PNG", lossless=True, exact=True)
    elif kind == "palette":
        image = Image.fromarray((alpha > 0).astype(np.uint8), "P")
        image.putpalette([*HIDDEN, *HIDDEN])
        image.save(buffer, "PNG", transparency=0)
    else:  # one colour is transparent
        red[:, :16, 2] += 1
        Image.fromarray(red[..., :3]).save(buffer, "PNG", transparency=(*HIDDEN[:2], HIDDEN[2] + 1))
    return buffer.getvalue()


def build_one(tmp_path: Path, data: bytes, background: str) -> tuple[BuildReport, tuple[int, ...], tuple[int, ...]]:
    """Build one picture; return the report, and the colours in the middles of its left and right half."""
    folder, rows = tmp_path / "images", tmp_path / "rows.jsonl"
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(data)
    rows.write_text('{"image": "a.png", "text": "a"}')
    out = tmp_path / background.strip("#")
    report = build_shards(folder, rows, out, samples_per_shard=9, background=background, workers=1, progress=False)
    pixels = decode_rgbx(read_all(out)["000000001"][0], 10**6)[..., :3].astype(int)
    return report, tuple(pixels[16, 6].tolist()), tuple(pixels[16, 25].tolist())


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "palette", "one colour", "half"])
@pytest.mark.parametrize(
    ("background", "colour"), [("white", (255,) * 3), ("black", (0,) * 3), ("#102030", (16, 32, 48)), ("keep", HIDDEN)]
)
def test_transparent_pixels_show_the_background(
    tmp_path: Path, kind: str, background: str, colour: tuple[int, ...]
) -> None:
    report, left, right = build_one(tmp_path, encoded(kind), background)
    share = HALF / 255 if kind == "half" and background != "keep" else 0
    expected = [share * hidden + (1 - share) * behind for hidden, behind in zip(HIDDEN, colour, strict=True)]
    # JPEG of quality 95 moves flat colours by 2 levels at most, and rounding by 1.
    assert np.abs(np.subtract(left, expected)).max() <= 3
    assert np.abs(np.subtract(right, HIDDEN)).max() <= 3
    assert report.transparent == 1
    how = "hidden colours shown" if background == "keep" else f"put on {background}"
    assert f"1 transparent picture: {how}" in report.describe()


def test_opaque_pictures_are_not_counted(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (32, 32), (*HIDDEN, 255)).save(buffer, "PNG")
    report, left, _ = build_one(tmp_path, buffer.getvalue(), "white")
    assert report.transparent == 0
    assert "transparent" not in report.describe()
    assert np.abs(np.subtract(left, HIDDEN)).max() <= 3


def test_other_backgrounds_are_refused(tmp_path: Path) -> None:
    for text in ("red", "#fff", "#12345g", ""):
        with pytest.raises(UserError, match=f"--background {text}: must be white, black, #rrggbb or keep"):
            build_shards(tmp_path, tmp_path / "a.csv", tmp_path / "out", samples_per_shard=1, background=text)
