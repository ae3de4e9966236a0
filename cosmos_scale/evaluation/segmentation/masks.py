"""A mask's file to true labels: classes from 0 on, and 255 for pixels that count nowhere."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from cosmos_scale.data.decode.picture import open_picture
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.evaluation.segmentation.overlap import IGNORED
from cosmos_scale.files import load_json

Labels = npt.NDArray[np.uint8]
"""[H, W]: the label of each pixel."""

MaskLaw = Callable[[bytes, int], Labels]
"""A mask's bytes, and the most pixels that it may have, to labels; raises DamagedSample."""

_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)  # numbers of COCO that no class has
_THING_NUMBERS, _STUFF_NUMBERS = 91, 182
_WRONG = -1


def stored_labels(data: bytes, max_pixels: int) -> Labels:
    """Return the numbers in a PNG, those of its palette's entries where it has one."""
    try:
        image = open_picture(data, max_pixels)
        if image.format != "PNG" or image.mode not in ("1", "L", "P", "I", "I;16"):
            raise DamagedSample(f"the mask is {image.format} of mode {image.mode}; rule: a PNG with one number a pixel")
        image.verify()  # every chunk's checksum, which decoding does not check; the check uses the file up
        numbers = np.array(open_picture(data, max_pixels))
    except DamagedSample:
        raise
    except Exception as error:  # of any type, as in decode_rgbx
        raise DamagedSample(f"the mask does not decode: {error}") from error
    if numbers.max(initial=0) > IGNORED:
        raise DamagedSample(f"the mask holds {numbers.max()}; rule: numbers from 0 to {IGNORED}")
    return numbers.astype(np.uint8)


def reduced_labels(data: bytes, max_pixels: int) -> Labels:
    """Return stored numbers, each lowered by one; 0 becomes ignored, like 255."""
    numbers = stored_labels(data, max_pixels)
    return np.where(numbers == IGNORED, IGNORED, numbers - 1).astype(np.uint8)  # 0 - 1 is 255 in 8 bits


def coco_stuff_labels(data: bytes, max_pixels: int) -> Labels:
    """Return labels 0..170 of a mask as COCO-Stuff publishes it: numbers 0..181 with gaps, 255 ignored."""
    return _mapped(stored_labels(data, max_pixels), _coco_stuff_table())


def coco_object_labels(data: bytes, max_pixels: int) -> Labels:
    """Return labels 0..80 of a mask as COCO-Stuff publishes it: objects from 1 on, all other pixels background 0."""
    return _mapped(stored_labels(data, max_pixels), _coco_object_table())


def _coco_stuff_table() -> npt.NDArray[np.int16]:
    table = np.full(256, _WRONG, dtype=np.int16)
    used = [number for number in range(_STUFF_NUMBERS) if number not in _UNUSED]
    table[used] = np.arange(len(used))
    table[IGNORED] = IGNORED
    return table


def _coco_object_table() -> npt.NDArray[np.int16]:
    table = np.zeros(256, dtype=np.int16)
    table[list(_UNUSED)] = _WRONG
    used = [number for number in range(_THING_NUMBERS) if number not in _UNUSED]
    table[used] = 1 + np.arange(len(used))
    return table


def _mapped(numbers: Labels, table: npt.NDArray[np.int16]) -> Labels:
    labels = table[numbers]
    if (labels == _WRONG).any():
        raise DamagedSample(f"the mask holds {numbers[labels == _WRONG][0]}, which is no number of COCO-Stuff's")
    return labels.astype(np.uint8)


# The label of each of Cityscapes' names in its evaluation; names that are not drawn at all are left out.
# Source: Cordts et al., The Cityscapes Dataset (CVPR 2016).
_CITYSCAPES: tuple[str, ...] = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
_CITYSCAPES_VOID: tuple[str, ...] = (
    *("unlabeled", "ego vehicle", "rectification border", "out of roi", "static", "dynamic", "ground", "parking"),
    *("rail track", "guard rail", "bridge", "tunnel", "polegroup", "caravan", "trailer"),
)
_CITYSCAPES_NOT_DRAWN = ("license plate",)
_GROUP = "group"


def cityscapes_labels(data: bytes, max_pixels: int) -> Labels:
    """Draw the labels of a Cityscapes file of polygons, the later ones over the earlier ones."""
    try:
        document = load_json(data)
        width, height = int(document["imgWidth"]), int(document["imgHeight"])
        if width * height > max_pixels:
            raise DamagedSample(f"the mask has {width} x {height} pixels, more than max_pixels {max_pixels}")
        image = Image.new("L", (width, height), IGNORED)
        draw = ImageDraw.Draw(image)
        for thing in document["objects"]:
            label = None if thing.get("deleted") else _cityscapes_label(thing["label"])
            if label is not None:
                draw.polygon([(x, y) for x, y in thing["polygon"]], fill=label)
    except DamagedSample:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError, MemoryError) as error:
        raise DamagedSample(f"the polygons cannot be read: {type(error).__name__}: {error}") from error
    return np.array(image)


def _cityscapes_label(name: Any) -> int | None:
    """Return the label of a polygon's name, None for one that is not drawn; raises DamagedSample for other names."""
    for known in (name, name.removesuffix(_GROUP)):
        if known in _CITYSCAPES:
            return _CITYSCAPES.index(known)
        if known in _CITYSCAPES_VOID:
            return IGNORED
        if known in _CITYSCAPES_NOT_DRAWN:
            return None
    raise DamagedSample(f"the polygons name {name!r}, which is no class of Cityscapes")


def checked_labels(labels: Labels, size: tuple[int, int], classes: int) -> Labels:
    """Return labels that fit a picture of a size (height, width) and the classes there are; raises DamagedSample."""
    if labels.shape != size:
        mask, picture = (f"{width} x {height}" for height, width in (labels.shape, size))
        raise DamagedSample(f"the mask has {mask} pixels, the picture, turned upright, {picture}")
    if (most := greatest_label(labels)) >= classes:
        raise DamagedSample(f"the mask holds label {most}, but the classes are 0 to {classes - 1}")
    return labels


def greatest_label(labels: Labels) -> int:
    """Return the greatest label that counts, -1 where none does."""
    counted = labels[labels != IGNORED]
    return int(counted.max()) if counted.size else -1
