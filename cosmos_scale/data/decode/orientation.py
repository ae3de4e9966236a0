"""Pictures that a camera stored turned: the EXIF tag says how to turn them for a viewer. Training ignores the tag."""

import io

from PIL import Image

TAG = 0x0112  # EXIF, "Orientation"
UPRIGHT = 1
# The turn that makes a picture upright, by the tag's value (Exif 2.32, 4.6.4.A).
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# One of these stands in every picture with the tag. To look for them is quick; Pillow may decode a PNG to find the tag.
_MARKS = (b"Exif", b"eXIf", b"EXIF", b"Raw profile type", b"adobe")


def orientation_of(image_bytes: bytes) -> int:
    """Return the orientation that a picture's tag says, 1 to 8; 1, which is upright, without a tag that can be read."""
    if not any(mark in image_bytes for mark in _MARKS):
        return UPRIGHT
    try:
        with Image.open(io.BytesIO(image_bytes), formats=("JPEG", "PNG", "WEBP")) as image:
            value = image.getexif().get(TAG, UPRIGHT)
    except Exception:  # of any type on broken bytes; whether the picture decodes is checked elsewhere
        return UPRIGHT
    return value if value in _TURNS else UPRIGHT


def turned_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return a picture as a viewer shows it. orientation: of its tag, 1 to 8."""
    return image if orientation == UPRIGHT else image.transpose(_TURNS[orientation])


def orientation_tag(orientation: int) -> Image.Exif:
    """Return EXIF that says an orientation and nothing else; nothing at all for an upright picture."""
    exif = Image.Exif()
    if orientation != UPRIGHT:
        exif[TAG] = orientation
    return exif
