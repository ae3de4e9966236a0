"""A picture as `data build` packs it: a sound JPEG."""

import io
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from cosmos_scale.data.decode.orientation import UPRIGHT, orientation_of, orientation_tag, turned_upright
from cosmos_scale.data.decode.picture import (
    DEFAULT_MAX_PIXELS,
    decode_rgbx,
    is_animated,
    is_transparent,
    picture_format,
)
from cosmos_scale.data.samples.sample import DamagedSample

JPEG_QUALITY = 95  # of converted pictures, with full colour resolution: almost no loss
JPEG_SIDE = 65_500  # pixels: libjpeg writes and reads no picture of more

Orientation = Literal["upright", "keep"]


class PictureRules(NamedTuple):
    """What becomes of pictures that are not plain.

    background: what stands behind transparent pixels; keep: their hidden colours show. orientation: whether pictures
    whose EXIF tag says so are turned upright, or keep their pixels and the tag.
    """

    background: str
    orientation: Orientation


class PackedPicture(NamedTuple):
    """A JPEG. transparent, animated: what it was made of. turned: whether its tag said to turn it.

    converted: whether it was made of a PNG or WebP.
    """

    data: bytes
    transparent: bool
    turned: bool
    animated: bool = False
    converted: bool = False


def pack_picture(data: bytes, rules: PictureRules) -> PackedPicture:
    """Make a JPEG of a picture, whose bytes stay where no rule changes them.

    Raises: DamagedSample where it is damaged, or has a longer side than a JPEG may have.
    """
    pixels = decode_rgbx(data, DEFAULT_MAX_PIXELS, rules.background)
    orientation = orientation_of(data)
    turned = orientation != UPRIGHT
    is_jpeg = picture_format(data[:12]) == "jpeg"
    if is_jpeg and (rules.orientation == "keep" or not turned):
        return PackedPicture(data, False, turned)
    height, width = pixels.shape[:2]
    if max(height, width) > JPEG_SIDE:
        raise DamagedSample(f"the picture has {width} x {height} pixels, and a JPEG at most {JPEG_SIDE} on a side")
    image = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    tag = orientation_tag(orientation if rules.orientation == "keep" else UPRIGHT)
    if rules.orientation == "upright":
        image = turned_upright(image, orientation)
    buffer = io.BytesIO()
    # Empty EXIF writes no byte.
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, exif=tag.tobytes() if len(tag) else b"")
    transparent, animated = (tells(data, DEFAULT_MAX_PIXELS) for tells in (is_transparent, is_animated))
    return PackedPicture(buffer.getvalue(), transparent, turned, animated, not is_jpeg)
