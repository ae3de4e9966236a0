"""What stands behind the transparent pixels of a picture, which becomes plain RGB."""

from PIL import Image, ImageColor

# Transparent pixels show the colours that the file hides under them, as in the published code.
KEEP = "keep"


def has_transparent_pixels(image: Image.Image) -> bool:
    """Return whether any pixel of an opened PNG or WebP lets a background through.

    Transparency comes as an alpha channel, as a palette's transparent colours, or as a PNG's one transparent colour.
    """
    # 16-bit grey with a transparent colour is left alone: Pillow makes it RGBA without transparency, and too bright.
    if image.mode.startswith("I") or not image.has_transparency_data:
        return False
    lowest = image.convert("RGBA").getchannel("A").getextrema()[0]
    return isinstance(lowest, (int, float)) and lowest < 255


def on_background(image: Image.Image, background: str) -> Image.Image:
    """Put an opened picture on white, black or #rrggbb; `keep` and pictures without transparency stay as they are."""
    if background == KEEP or image.mode.startswith("I") or not image.has_transparency_data:
        return image
    canvas = Image.new("RGBA", image.size, (*ImageColor.getrgb(background)[:3], 255))
    return Image.alpha_composite(canvas, image.convert("RGBA"))
