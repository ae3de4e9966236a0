"""Encoded pictures to pixels: 8-bit RGB, EXIF orientation ignored, nothing damaged let through."""

import io

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from cosmos_scale.data.sample import DamagedSample

Pixels = npt.NDArray[np.uint8]

JPEG_START = b"\xff\xd8\xff"


def decode_rgbx(image_bytes: bytes, max_pixels: int) -> Pixels:
    """Decode JPEG, PNG or WebP to [H, W, 4] uint8: RGB and a fourth channel without meaning.

    Four channels because resizing them is two to three times faster than three. Raises DamagedSample for anything that
    does not decode completely, or has more than `max_pixels` pixels.
    """
    if not image_bytes:
        raise DamagedSample("the picture is empty (0 bytes)")
    try:
        if image_bytes.startswith(JPEG_START):
            return _decode_jpeg(image_bytes, max_pixels)
        return _decode_other(image_bytes, max_pixels)
    except DamagedSample:
        raise
    except Exception as error:
        # Decoders raise almost any type on broken bytes: OSError, SyntaxError, ValueError, struct.error, ...
        raise DamagedSample(f"the picture does not decode: {error}") from error


def _decode_jpeg(image_bytes: bytes, max_pixels: int) -> Pixels:
    """Decode strictly: libjpeg alone fills what is missing with grey, and Pillow does not tell."""
    height, width, colourspace, _ = simplejpeg.decode_jpeg_header(image_bytes)
    _check_size(height, width, max_pixels)
    if colourspace in ("CMYK", "YCCK"):
        # Strictly first, for its errors; then Pillow, which knows Adobe's inverted inks.
        simplejpeg.decode_jpeg(image_bytes, colorspace="CMYK")
        return _decode_other(image_bytes, max_pixels)
    # Neither shortcut: with both off the pixels equal Pillow's bit for bit.
    pixels: Pixels = simplejpeg.decode_jpeg(image_bytes, colorspace="RGBX", fastdct=False, fastupsample=False)
    return pixels


def _decode_other(image_bytes: bytes, max_pixels: int) -> Pixels:
    try:
        image = Image.open(io.BytesIO(image_bytes), formats=("JPEG", "PNG", "WEBP"))
    except UnidentifiedImageError:
        raise DamagedSample("the picture is not a JPEG, PNG or WebP") from None
    _check_size(image.height, image.width, max_pixels)
    if image.format == "PNG":
        # Checks every chunk's checksum, which decoding leaves out. It uses the file up: open it again.
        image.verify()
        image = Image.open(io.BytesIO(image_bytes))
    if image.mode.startswith("I"):
        # 16-bit grey. Pillow's own conversion clips it at 255: almost white.
        return _rgbx(Image.fromarray((np.asarray(image) // 256).astype(np.uint8)))
    # A palette goes through RGBA: Pillow warns of its transparency otherwise. Transparent pixels keep their colour.
    return _rgbx(image.convert("RGBA") if image.mode == "P" else image)


def _rgbx(image: Image.Image) -> Pixels:
    # A copy: Pillow's own memory is read-only, and torch takes no such arrays.
    return np.array(image.convert("RGB").convert("RGBX"))


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DamagedSample(f"the picture has {width} x {height} pixels, more than max_pixels {max_pixels}")
