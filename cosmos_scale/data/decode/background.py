"""What stands behind the transparent pixels of a picture, which becomes plain RGB."""

import io

import numpy as np
from PIL import Image, ImageColor
from PIL.PngImagePlugin import PngImageFile

# Transparent pixels show the colours that the file hides under them, as in the published code.
KEEP = "keep"


def has_transparent_pixels(image: Image.Image) -> bool:
    """Return whether any pixel of an opened PNG or WebP lets a background through.

    Transparency comes as an alpha channel, as a palette's transparent colours, or as a PNG's one transparent colour.
    """
    image = eight_bits(image)
    if not image.has_transparency_data:
        return False
    lowest = image.convert("RGBA").getchannel("A").getextrema()[0]
    return isinstance(lowest, (int, float)) and lowest < 255


def eight_bits(image: Image.Image) -> Image.Image:
    """Return an opened picture of 16 bits a channel as one of 8 bits, with alpha where one value or colour is
    transparent; others as they are.

    Pillow's own conversion of grey clips values at 255, which makes the picture almost white, and forgets the
    transparent one. Of colours it keeps the high bytes, among which the transparent 16-bit colour is not found.
    """
    if _is_16_bit_colour(image) and isinstance(image.info.get("transparency"), tuple):
        return _with_clear_colour(image)
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    grey = Image.fromarray((values // 256).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _is_16_bit_colour(image: Image.Image) -> bool:
    return isinstance(image, PngImageFile) and [tile[3] for tile in image.tile] == ["RGB;16B"]


def _with_clear_colour(image: Image.Image) -> Image.Image:
    """Return a PNG of 16-bit colours, whose pixels are not read yet, as RGBA: alpha is 0 at its transparent colour.

    Its pixels are read twice: the high bytes of their values, and the low ones.
    """
    assert isinstance(image, PngImageFile)
    assert image.fp is not None
    place = image.fp.tell()
    image.fp.seek(0)
    low = PngImageFile(io.BytesIO(image.fp.read()))
    image.fp.seek(place)
    # Plain tuples: Pillow before 11 has no others.
    low.tile = [(*tile[:3], "RGB;16L") for tile in low.tile]  # type: ignore[misc]
    high = np.asarray(image)
    values = high.astype(np.uint16) << 8 | np.asarray(low)
    clear = (values == np.array(image.info["transparency"])).all(axis=2)
    colours = Image.fromarray(high)
    colours.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return colours


def on_background(image: Image.Image, background: str) -> Image.Image:
    """Put an opened picture on white, black or #rrggbb; `keep` and pictures without transparency stay as they are."""
    if background == KEEP or not image.has_transparency_data:
        return image
    canvas = Image.new("RGBA", image.size, (*ImageColor.getrgb(background)[:3], 255))
    return Image.alpha_composite(canvas, image.convert("RGBA"))
