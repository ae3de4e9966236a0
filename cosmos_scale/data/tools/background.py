"""What stands behind transparent pixels where a picture becomes JPEG, which has no transparency."""

import re
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor

from cosmos_scale.data.decode.picture import Pixels, open_picture
from cosmos_scale.errors import UserError

Colour = tuple[int, int, int]


class Flattened(NamedTuple):
    """A picture's pixels, [H, W, 3] uint8. transparent: whether any pixel let the background through."""

    pixels: Pixels
    transparent: bool


def parse_background(text: str) -> Colour | None:
    """Return the colour that white, black or #rrggbb means; None for keep, which leaves hidden colours as they are.

    Raises: UserError for any other text.
    """
    if text == "keep":
        return None
    if text not in ("white", "black") and not re.fullmatch("#[0-9a-fA-F]{6}", text):
        raise UserError(f"--background {text}: must be white, black, #rrggbb or keep")
    red, green, blue = ImageColor.getrgb(text)[:3]
    return red, green, blue


def flatten(image_bytes: bytes, pixels: Pixels, background: Colour | None, max_pixels: int) -> Flattened:
    """Put a PNG or WebP that was decoded to `pixels` ([H, W, 4], alpha dropped) on a background.

    Transparency comes as an alpha channel, as a palette's transparent colours, or as a PNG's one transparent colour.
    """
    image = open_picture(image_bytes, max_pixels)
    opaque = Flattened(np.ascontiguousarray(pixels[..., :3]), transparent=False)
    # 16-bit grey with a transparent colour is left alone: Pillow makes it RGBA without transparency, and too bright.
    if image.mode.startswith("I") or not image.has_transparency_data:
        return opaque
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema()[0] == 255:
        return opaque
    if background is None:
        return opaque._replace(transparent=True)
    canvas = Image.new("RGBA", rgba.size, (*background, 255))
    return Flattened(np.array(Image.alpha_composite(canvas, rgba).convert("RGB")), transparent=True)
