"""What numbers in mask files mean, and masks that cannot be used."""

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.evaluation.segmentation.masks import (
    Labels,
    MaskLaw,
    checked_labels,
    cityscapes_labels,
    coco_object_labels,
    coco_stuff_labels,
    reduced_labels,
    stored_labels,
)

MOST = 10**6
COCO_GAPS = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def mask_of(values: list[int]) -> bytes:
    return png(Image.fromarray(np.array([values], dtype=np.uint8)))


def read(law: MaskLaw, values: list[int]) -> list[int]:
    return list(map(int, law(mask_of(values), MOST)[0]))


def test_numbers_are_those_of_palette_entries_and_never_colours() -> None:
    image = Image.fromarray(np.array([[0, 7, 255]], dtype=np.uint8), "L").convert("P")
    values = np.array([[0, 7, 255]], dtype=np.uint8)
    image = Image.fromarray(values, "P")
    image.putpalette([200 - entry % 200 for entry in range(768)])
    assert stored_labels(png(image), MOST).tolist() == values.tolist()
    wide = Image.fromarray(np.array([[0, 7, 255]], dtype=np.uint16))
    assert stored_labels(png(wide), MOST).tolist() == values.tolist()


def test_reduced_labels_lower_by_one_and_ignore_zero() -> None:
    assert read(reduced_labels, [0, 1, 2, 254, 255]) == [255, 0, 1, 253, 255]


def test_coco_stuff_closes_the_gaps() -> None:
    used = [number for number in range(182) if number not in COCO_GAPS]
    assert len(used) == 171
    assert read(coco_stuff_labels, [*used, 255]) == [*range(171), 255]
    for number in (*COCO_GAPS, 182, 254):
        with pytest.raises(DamagedSample, match=f"the mask holds {number}, which is no number of COCO-Stuff"):
            read(coco_stuff_labels, [0, number])


def test_coco_object_makes_all_else_background() -> None:
    things = [number for number in range(91) if number not in COCO_GAPS]
    assert len(things) == 80
    assert read(coco_object_labels, things) == list(range(1, 81))
    assert set(read(coco_object_labels, [*range(91, 182), 255])) == {0}


def polygons(*things: tuple[str, list[list[int]]], **more: Any) -> bytes:
    objects = [{"label": label, "polygon": polygon, **more} for label, polygon in things]
    return json.dumps({"imgWidth": 8, "imgHeight": 6, "objects": objects}).encode()


def box(top: int, bottom: int, left: int, right: int) -> list[list[int]]:
    """The corners of a box whose last row and column are bottom and right."""
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def test_cityscapes_polygons_are_drawn_in_their_order() -> None:
    drawn = cityscapes_labels(
        polygons(
            ("road", box(0, 5, 0, 7)),
            ("cargroup", box(1, 3, 1, 4)),
            ("polegroup", box(0, 0, 0, 1)),
            ("static", box(5, 5, 6, 7)),
            ("license plate", box(2, 2, 2, 2)),
            ("traffic light", box(3, 4, 4, 6)),
        ),
        MOST,
    )
    expected = np.zeros((6, 8), dtype=np.uint8)
    expected[1:4, 1:5] = 13
    expected[0, :2] = 255
    expected[5, 6:] = 255
    expected[3:5, 4:7] = 6
    assert drawn.tolist() == expected.tolist()
    assert set(cityscapes_labels(polygons(("road", box(0, 5, 0, 7)), deleted=1), MOST).ravel()) == {255}


@pytest.mark.parametrize(
    ("law", "data", "message"),
    [
        (stored_labels, png(Image.new("RGB", (3, 2))), "mode RGB; rule: a PNG with one number a pixel"),
        (stored_labels, mask_of([1] * 900)[:60], "does not decode"),
        (stored_labels, b"no mask", "not a JPEG, PNG or WebP"),
        (stored_labels, png(Image.fromarray(np.array([[300]], dtype=np.uint16))), "holds 300; rule: numbers from 0"),
        (stored_labels, mask_of([0] * (MOST + 1)), "more than max_pixels"),
        (cityscapes_labels, b"[}", "polygons cannot be read"),
        (cityscapes_labels, b"[1, 2]", "polygons cannot be read"),
        (cityscapes_labels, polygons(("spaceship", box(0, 1, 0, 1))), "name 'spaceship', which is no class"),
        (cityscapes_labels, polygons(("road", [[1]])), "polygons cannot be read"),
        (cityscapes_labels, b'{"imgWidth": 100000, "imgHeight": 100000, "objects": []}', "more than max_pixels"),
    ],
)
def test_masks_that_cannot_be_used_say_why(law: MaskLaw, data: bytes, message: str) -> None:
    with pytest.raises(DamagedSample, match=message):
        law(data, MOST)


def test_masks_must_fit_their_pictures_and_classes() -> None:
    labels: Labels = np.array([[0, 2, 255]], dtype=np.uint8)
    assert checked_labels(labels, (1, 3), 3) is labels
    with pytest.raises(DamagedSample, match="the mask has 3 x 1 pixels, the picture, turned upright, 1 x 3"):
        checked_labels(labels, (3, 1), 3)
    with pytest.raises(DamagedSample, match="holds label 2, but the classes are 0 to 1"):
        checked_labels(labels, (1, 3), 2)
