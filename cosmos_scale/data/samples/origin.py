"""Where a built sample comes from: a key of its json that no caption sampling reads."""

from typing import Any

ORIGIN_KEY = "origin"


def make_origin(captions: str, row: int, image: str | None) -> dict[str, Any]:
    """Return the origin of a row's sample. captions: the file's name. row: from 1. image: the picture it names."""
    # Bytes of a file's name that are not UTF-8 are lone surrogates here: they are spelled out (\xe9).
    shown = captions.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return {"captions": shown, "row": row, "image": image}


def describe_origin(document: dict[str, Any]) -> str | None:
    """Return a sample's origin as "captions.csv row 3, photos/3.jpg"; None where its json does not say it."""
    origin = document.get(ORIGIN_KEY)
    if not isinstance(origin, dict) or not {"captions", "row", "image"} <= origin.keys():
        return None
    return f"{origin['captions']} row {origin['row']}, {origin['image']}"
