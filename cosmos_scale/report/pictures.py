"""Pictures inside of the page: as JPEG in the text of HTML."""

import base64
import io
from typing import NamedTuple

from PIL import Image


class PagePicture(NamedTuple):
    """A picture for the page. source: the whole picture as a data URI. said: in words. width, height: in pixels."""

    source: str
    said: str
    width: int
    height: int


def picture_of(image: Image.Image, said: str, *, width: int, quality: int = 82) -> PagePicture:
    """Return a picture, made smaller where it is wider than `width` pixels; one that is smaller stays as it is."""
    if image.width > width:
        size = width, max(1, round(image.height * width / image.width))
        image = image.resize(size, Image.Resampling.LANCZOS)
    written = io.BytesIO()
    image.convert("RGB").save(written, format="JPEG", quality=quality, optimize=True)
    data = base64.b64encode(written.getvalue()).decode()
    return PagePicture(f"data:image/jpeg;base64,{data}", said, image.width, image.height)
