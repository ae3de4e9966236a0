"""Encoded pictures to pixels: 8-bit RGB, EXIF orientation ignored, nothing damaged let through."""

import io
import warnings
from typing import Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from cosmos_scale.config import DataConfig
from cosmos_scale.data.decode.background import KEEP, eight_bits, has_transparent_pixels, on_background
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.words import with_article

Pixels = npt.NDArray[np.uint8]

# data.max_pixels of a run whose config says nothing else.
DEFAULT_MAX_PIXELS: int = DataConfig.model_fields["max_pixels"].default

# Every size is compared with data.max_pixels before Pillow sees the picture. Pillow's own limit would warn of pictures
# that the config allows, or refuse them.
Image.MAX_IMAGE_PIXELS = None

# Of each format that is not read: where its files have which bytes.
_NOT_READ = (
    ("GIF", (0, b"GIF8")),
    ("TIFF", (0, b"II*\0")),
    ("TIFF", (0, b"MM\0*")),
    ("AVIF", (4, b"ftypavi")),
    ("HEIC", (4, b"ftyphe")),
    ("HEIF", (4, b"ftypmif1")),
    ("JPEG 2000", (4, b"jP  ")),
    ("JPEG XL", (4, b"JXL ")),
)


def ignore_warnings_of_pillow() -> None:
    """Let Pillow not warn of broken tags, on which nothing here depends: it names a line of its own, and no picture."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


ignore_warnings_of_pillow()


def picture_format(head: bytes) -> Literal["jpeg", "png", "webp"] | None:
    """Tell a picture's format from its first bytes, 12 or more; None for anything that is not read here."""
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    return None


def other_format(head: bytes) -> str | None:
    """Tell the format of a picture that is not read here from its first bytes, 12 or more; None for anything else."""
    if head.startswith(b"BM") and head[6:10] == bytes(4):
        return "BMP"
    return next((name for name, (place, sign) in _NOT_READ if head.startswith(sign, place)), None)


def not_read(head: bytes) -> str:
    """Say that a file is not a picture that is read here, and of which format it is, by its first bytes."""
    kind = other_format(head)
    return f"{with_article(kind)}, not a JPEG, PNG or WebP" if kind else "not a JPEG, PNG or WebP"


def decode_rgbx(image_bytes: bytes, max_pixels: int, background: str = KEEP) -> Pixels:
    """Decode JPEG, PNG or WebP to [H, W, 4] uint8: RGB and a fourth channel without meaning.

    To resize four channels is two to three times faster than to resize three. Raises DamagedSample for a picture that
    does not decode completely, or has more than `max_pixels` pixels.
    background: what stands behind transparent pixels, as in data.background.
    """
    if not image_bytes:
        raise DamagedSample("the picture is empty (0 bytes)")
    try:
        if picture_format(image_bytes) == "jpeg":
            return _decode_jpeg(image_bytes, max_pixels)
        return _decode_other(image_bytes, max_pixels, background)
    except (DamagedSample, MemoryError):  # where memory runs out, the picture is not to blame
        raise
    except Exception as error:
        # Decoders raise almost any type on broken bytes: OSError, SyntaxError, ValueError, struct.error, ...
        raise DamagedSample(f"the picture does not decode: {error}") from error


def _decode_jpeg(image_bytes: bytes, max_pixels: int) -> Pixels:
    """Decode strictly: libjpeg by itself fills missing parts with grey, and Pillow does not report it."""
    height, width, colourspace, _ = simplejpeg.decode_jpeg_header(image_bytes)
    _check_size(height, width, max_pixels)
    if colourspace in ("CMYK", "YCCK"):
        # First a strict decoding, for its errors; then Pillow's, which knows Adobe's inverted inks.
        simplejpeg.decode_jpeg(image_bytes, colorspace="CMYK")
        return _decode_other(image_bytes, max_pixels)
    # Without both shortcuts (fastdct, fastupsample) the pixels equal Pillow's bit for bit.
    pixels: Pixels = simplejpeg.decode_jpeg(image_bytes, colorspace="RGBX", fastdct=False, fastupsample=False)
    return pixels


def _decode_other(image_bytes: bytes, max_pixels: int, background: str = KEEP) -> Pixels:
    image = open_picture(image_bytes, max_pixels)
    if image.format == "PNG":
        # Checks every chunk's checksum, which decoding does not. The check uses the file up, so open it again.
        image.verify()
        image = Image.open(io.BytesIO(image_bytes))
    return rgbx_of(image, background)


def rgbx_of(image: Image.Image, background: str = KEEP) -> Pixels:
    """Return an opened picture as [H, W, 4] uint8, as `decode_rgbx` does; for broken bytes raises as Pillow does."""
    image = on_background(eight_bits(image), background)
    # A palette goes through RGBA, or Pillow warns of the palette's transparency. Transparent pixels keep their colour.
    image = image.convert("RGBA") if image.mode == "P" else image
    # A copy: Pillow's own memory is read-only, and torch takes no read-only arrays.
    return np.array(image.convert("RGB").convert("RGBX"))


def is_transparent(image_bytes: bytes, max_pixels: int) -> bool:
    """Return whether a picture that decodes has transparent pixels; False for one that does not decode."""
    if picture_format(image_bytes[:12]) == "jpeg":
        return False
    try:
        return has_transparent_pixels(open_picture(image_bytes, max_pixels))
    except Exception:  # of any type, as in decode_rgbx, which says what is wrong
        return False


def is_animated(image_bytes: bytes, max_pixels: int) -> bool:
    """Return whether a picture that decodes is a PNG or WebP of several frames, of which the first is read."""
    if picture_format(image_bytes[:12]) == "jpeg":
        return False
    try:
        return bool(getattr(open_picture(image_bytes, max_pixels), "is_animated", False))
    except Exception:  # of any type, as in decode_rgbx, which says what is wrong
        return False


def open_picture(image_bytes: bytes, max_pixels: int) -> Image.Image:
    """Read a picture's header; pixels are read when they are asked for.

    Raises DamagedSample where the file is no picture or has more than `max_pixels` pixels, and any exception of Pillow
    where the file is broken.
    """
    stated = _stated_size(image_bytes)
    if stated is not None:  # before the file is opened, since opening allocates a WebP's whole canvas
        _check_size(*stated, max_pixels)
    try:
        image = Image.open(io.BytesIO(image_bytes), formats=("JPEG", "PNG", "WEBP"))
    except UnidentifiedImageError:
        raise DamagedSample(f"the picture is {not_read(image_bytes[:12])}") from None
    _check_size(image.height, image.width, max_pixels)
    return image


def _stated_size(image_bytes: bytes) -> tuple[int, int] | None:
    """Height and width by the header of a PNG (its specification, 11.2.1) or WebP (RFC 9649, 2.5-2.7); else None."""
    head = image_bytes[:30]
    if len(head) < 30:
        return None
    kind = picture_format(head)
    if kind == "png":
        return int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big")
    if kind != "webp":
        return None
    if head[12:16] == b"VP8X":
        return 1 + int.from_bytes(head[27:30], "little"), 1 + int.from_bytes(head[24:27], "little")
    if head[12:16] == b"VP8L":  # 14 bits each
        sizes = int.from_bytes(head[21:25], "little")
        return 1 + (sizes >> 14 & 0x3FFF), 1 + (sizes & 0x3FFF)
    if head[12:16] == b"VP8 ":  # 14 bits each, and two bits of scaling
        return int.from_bytes(head[28:30], "little") & 0x3FFF, int.from_bytes(head[26:28], "little") & 0x3FFF
    return None


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DamagedSample(f"the picture has {width} x {height} pixels, more than max_pixels {max_pixels}")
