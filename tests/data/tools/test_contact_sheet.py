"""The contact sheet: every view is in it pixel by pixel, and no caption is cut off."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from cosmos_scale.data.decode import Views
from cosmos_scale.data.tools.contact_sheet import GLOBAL, LOCAL, ORIGINAL_WIDTH, Original, contact_sheet, to_image


def noise(
    count: int, side: int, seed: int
) -> tuple[torch.Tensor, list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]]:
    """Views of random pixels, and the pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), list(pixels)


def test_a_picture_has_the_levels_of_its_view() -> None:
    pixels = np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3)
    np.testing.assert_array_equal(np.asarray(to_image(torch.from_numpy(pixels).permute(2, 0, 1))), pixels)


@pytest.mark.parametrize(("global_size", "local_size", "local_crops"), [(224, 96, 6), (64, 24, 5), (40, 40, 0)])
def test_every_view_is_shown_unscaled(tmp_path: Path, global_size: int, local_size: int, local_crops: int) -> None:
    samples, all_pixels = [], []
    for seed in range(3):
        global_crops, global_pixels = noise(2, global_size, seed)
        local_crops_tensor, local_pixels = noise(local_crops, local_size, seed + 100)
        samples.append((Views(global_crops, local_crops_tensor), ["a cat. a dog", "a dog", "a mat"]))
        all_pixels += global_pixels + local_pixels
    path = tmp_path / "new folder" / "sheet.png"
    contact_sheet(samples, path)
    sheet = np.asarray(Image.open(path))
    for pixels in all_pixels:
        side = len(pixels)
        # Two pixels of noise find the candidates; then the whole view must be there.
        hits = (sheet[:-1, :-1] == pixels[0, 0]).all(-1) & (sheet[1:, 1:] == pixels[1, 1]).all(-1)
        places = [sheet[top : top + side, left : left + side] for top, left in np.argwhere(hits)]
        assert any(np.array_equal(place, pixels) for place in places)


def test_zoom_shows_every_pixel_as_a_square(tmp_path: Path) -> None:
    crops, pixels = noise(1, 32, 0)
    samples = [(Views(crops, crops[:0]), ["a cat"])]
    sheets = []
    for zoom in (1, 3):
        contact_sheet(samples, tmp_path / "sheet.png", zoom=zoom)
        sheets.append(np.asarray(Image.open(tmp_path / "sheet.png")))
    plain, zoomed = sheets
    rows, columns = np.argwhere((plain[:-1, :-1] == pixels[0][0, 0]).all(-1)).T
    places = [zoomed[top : top + 96, left : left + 96] for top, left in zip(rows, columns, strict=True)]
    assert any(np.array_equal(place, pixels[0].repeat(3, 0).repeat(3, 1)) for place in places)


def test_captions_are_wrapped_not_cut(tmp_path: Path) -> None:
    views = Views(noise(2, 32, 0)[0], noise(2, 16, 1)[0])
    heights, inks = [], []
    for words in (0, 10, 100):
        path = tmp_path / f"{words}.png"
        contact_sheet([(views, ["word " * words, "x" * words, ""])], path)
        sheet = np.asarray(Image.open(path).convert("L"))
        captions = sheet[:, 200:]
        assert (captions[:, -15:] == 255).all(), "text runs over the right margin"
        heights.append(sheet.shape[0])
        inks.append(int((255 - captions.astype(np.int64)).sum()))
    assert heights[0] <= heights[1] < heights[2]
    # Beyond the labels, ten times the words are ten times the ink; glyphs at other pixel offsets differ by percents.
    assert inks[2] - inks[0] == pytest.approx(10 * (inks[1] - inks[0]), rel=0.05)


@pytest.mark.parametrize("picture_size", [(60, 340), (900, 680), (2, 2000), (2000, 2)])
def test_originals_show_the_box_of_every_view(tmp_path: Path, picture_size: tuple[int, int]) -> None:
    height, width = picture_size
    samples = [(Views(noise(1, 224, 0)[0], noise(1, 96, 1)[0]), ["a cat", "a mat"])]
    contact_sheet(samples, tmp_path / "plain.png", 1)
    boxes = np.array([[0, 0, height, width // 2], [0, width // 2, height, width - width // 2]])
    original = Original("000007 in a.tar " + "far/" * 200, np.full((height, width, 4), 128, dtype=np.uint8), boxes)
    contact_sheet(samples, tmp_path / "sheet.png", 1, originals=[original])
    plain, sheet = (np.asarray(Image.open(tmp_path / name)) for name in ("plain.png", "sheet.png"))
    # At the right is the row as drawn without original, less the margins; above it is the title.
    row = plain[20:-20, 20:-20]
    tops = [
        top
        for top in range(len(sheet) - len(row))
        if np.array_equal(sheet[top : top + len(row), -20 - row.shape[1] : -20], row)
    ]
    assert len(tops) == 1
    assert tops[0] > 2 * 18 + 20, "the long title takes more lines than one"
    assert sheet.shape[1] == plain.shape[1] + ORIGINAL_WIDTH + 40
    before = sheet[:, : 20 + ORIGINAL_WIDTH]
    frames = [np.argwhere((before == ImageColor.getrgb(colour)).all(-1)) for colour in (GLOBAL, LOCAL)]
    if min(picture_size) > 2:
        scale = min(ORIGINAL_WIDTH / width, (len(row) - 18) / height)
        for frame, box in zip(frames, boxes, strict=True):
            size = frame.max(0) - frame.min(0) + 1
            # Rounded to whole pixels at both ends.
            np.testing.assert_allclose(size, np.round(scale * box[2:]), atol=1)
        assert frames[0][:, 1].max() < frames[1][:, 1].min()


def test_no_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        contact_sheet([], tmp_path / "sheet.png")
