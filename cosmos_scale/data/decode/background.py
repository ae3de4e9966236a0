"""What stands behind the transparent pixels of a picture, which becomes plain RGB."""

import numpy as np
from PIL import Image, ImageColor

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
    """Return a picture of 16-bit grey as 8-bit grey, with alpha where one value is transparent; others as they are.

    Pillow's own conversion clips values at 255, which makes the picture almost white, and forgets the transparent one.
    """
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    grey = Image.fromarray((values // 256).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def on_background(image: Image.Image, background: str) -> Image.Image:
    """Put an opened picture on white, black or #rrggbb; `keep` and pictures without transparency stay as they are."""
    if background == KEEP or not image.has_transparency_data:
        return image
    canvas = Image.new("RGBA", image.size, (*ImageColor.getrgb(background)[:3], 255))
    return Image.alpha_composite(canvas, image.convert("RGBA"))
