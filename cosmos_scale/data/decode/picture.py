"""Encoded pictures to pixels: 8-bit RGB, EXIF orientation ignored, nothing damaged let through."""

import io
import warnings

import numpy as np
import numpy.typing as npt
import simplejpeg  # type: ignore[import-untyped]
from PIL import Image

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
    with warnings.catch_warnings():
        # Our own limit is `max_pixels`; Pillow's warning about large pictures would repeat it in every worker.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image: Image.Image = Image.open(io.BytesIO(image_bytes), formats=("JPEG", "PNG", "WEBP"))
    _check_size(image.height, image.width, max_pixels)
    if image.mode.startswith("I"):
        # 16-bit grey. Pillow's own conversion clips it at 255: almost white.
        values = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(values.astype(np.uint8))
    return np.asarray(image.convert("RGB").convert("RGBX"))


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DamagedSample(f"the picture has {width} x {height} pixels, more than max_pixels {max_pixels}")
