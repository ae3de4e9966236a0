"""From a picture's bytes to what the tower sees: against OpenCV, Pillow and whole-number arithmetic."""

import io

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.evaluation.segmentation.pixels import decode_upright, normalise_levels, resize_for_windows
from tests.evaluation.segmentation import oracle


def picture(height: int, width: int, seed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pictures_are_turned_upright_as_opencv_and_pillow_do(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(picture(20, 31)).save(file, kind, exif=exif)
    upright = decode_upright(file.getvalue(), 10**6)
    with Image.open(file) as image:
        assert np.array_equal(upright, np.array(ImageOps.exif_transpose(image).convert("RGB")))
    if kind == "JPEG":
        by_opencv = cv2.imdecode(np.frombuffer(file.getvalue(), dtype=np.uint8), cv2.IMREAD_COLOR)
        assert by_opencv is not None
        assert np.array_equal(upright, by_opencv[..., ::-1])


@pytest.mark.parametrize(
    ("height", "width", "short_side", "expected"),
    [
        (375, 500, 336, (336, 448)),
        (500, 375, 336, (448, 336)),
        (1024, 2048, 560, (560, 1120)),
        (100, 150, 336, (336, 504)),  # enlarged
        (300, 3000, 336, (205, 2048)),  # the longer side is limited
        (333, 500, 336, (336, 505)),
    ],
)
def test_sizes_keep_the_aspect(height: int, width: int, short_side: int, expected: tuple[int, int]) -> None:
    assert resize_for_windows(picture(height, width), short_side).shape[:2] == expected
    assert oracle.target_size(height, width, short_side) == expected


@pytest.mark.parametrize(("height", "width", "short_side"), [(96, 130, 64), (77, 51, 40), (64, 64, 64), (50, 40, 90)])
def test_levels_are_those_of_weights_of_11_bits(height: int, width: int, short_side: int) -> None:
    resized = resize_for_windows(picture(height, width), short_side)
    expected = oracle.resize_8_bit(picture(height, width), resized.shape[1], resized.shape[0])
    assert np.array_equal(resized, expected)


def test_levels_are_normalised_by_the_rounded_figures() -> None:
    levels = picture(5, 7)
    expected = torch.from_numpy(oracle.normalised(levels))
    assert (normalise_levels(levels) - expected).abs().max() < 1e-6  # rounding of float32 below 2.2


def test_pictures_without_a_pixel_left_are_damaged() -> None:
    with pytest.raises(DamagedSample, match="10000 x 1 pixels, too narrow"):
        resize_for_windows(picture(1, 10000), 336)
