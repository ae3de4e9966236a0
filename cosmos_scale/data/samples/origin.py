"""Where a built sample comes from: a key of its json that no caption sampling reads."""

from collections.abc import Sequence
from typing import Any

ORIGIN_KEY = "origin"
JOINED_KEY = "joined_rows"


def make_origin(captions: str, row: int, image: str | None, joined: Sequence[int] = ()) -> dict[str, Any]:
    """Return the origin of a row's sample.

    captions: the file's name. row: from 1. image: the picture it names. joined: other rows of the sample's captions.
    """
    # Bytes of a file's name that are not UTF-8 are lone surrogates here: they are spelled out (\xe9).
    shown = captions.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    origin = {"captions": shown, "row": row, "image": image}
    return {**origin, JOINED_KEY: list(joined)} if joined else origin


def describe_origin(document: dict[str, Any]) -> str | None:
    """Return a sample's origin as "captions.csv row 3, photos/3.jpg"; None where its json does not say it."""
    origin = document.get(ORIGIN_KEY)
    if not isinstance(origin, dict) or not {"captions", "row", "image"} <= origin.keys():
        return None
    joined = origin.get(JOINED_KEY)
    more = f" and {len(joined)} more" if isinstance(joined, list) and joined else ""
    return f"{origin['captions']} row {origin['row']}{more}, {origin['image']}"
