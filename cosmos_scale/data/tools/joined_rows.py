"""The rows of one picture as one row, with all captions; the rows of a picture may stand anywhere in the file."""

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np

from cosmos_scale.data.samples.caption_keys import WHOLE_KEYS
from cosmos_scale.data.tools.captions_file import CaptionRow
from cosmos_scale.files import regular_only, writing


def picture_digest(path: Path) -> int:
    """Return 64 bits that tell a picture's file from others: a link is the picture that it leads to."""
    return _digest(os.path.realpath(path))


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(os.fsencode(text), digest_size=8).digest(), "big")


def joined_rows(
    rows: Iterable[CaptionRow], picture_of: Callable[[CaptionRow], Path | None], copy: Path
) -> Iterator[CaptionRow]:
    """Yield the rows in order, each picture's rows as one row in the place of the picture's first row.

    picture_of: the picture of a row; None for a row that cannot be used, which stays a row of its own.
    copy: a file that the rows are copied to, so that they can be read by place: only places are in memory, a few dozen
    bytes a row. It is deleted at the end.
    """
    offsets: array[int] = array("Q")
    digests: array[int] = array("Q")
    with writing(copy), open(copy, "wb", opener=regular_only) as file:
        for place, row in enumerate(rows):
            path = picture_of(row)
            digests.append(picture_digest(path) if path is not None else _digest(f"\n{place}"))
            offsets.append(file.tell())
            file.write(json.dumps(row).encode() + b"\n")
    _, first, group = np.unique(np.asarray(digests), return_index=True, return_inverse=True)
    firsts = first[group.reshape(-1)]  # of each row, the place of the first row of its picture
    order = np.argsort(firsts, kind="stable")
    with open(copy, "rb", opener=regular_only) as file:
        alike: list[CaptionRow] = []
        before = -1
        for place in map(int, order):
            if alike and firsts[place] != before:
                yield _join(alike)
                alike.clear()
            before = firsts[place]
            file.seek(offsets[place])
            alike.append(_row(file.readline()))
        if alike:
            yield _join(alike)
    copy.unlink()


def _row(line: bytes) -> CaptionRow:
    number, image, document, fault, unread, joined, key = json.loads(line)
    return CaptionRow(number, image, document, fault, tuple(unread), tuple(joined), key)


def _join(rows: list[CaptionRow]) -> CaptionRow:
    """Join the rows of one picture: each key's captions become a list, in the order of the rows.

    Captions that stay one string must be the same in all rows, or the rows have a fault: a text would be lost.
    """
    if len(rows) == 1:
        return rows[0]
    document: dict[str, str | list[str]] = {}
    fault = None
    for row in rows:
        for key, value in row.document.items():
            if key in WHOLE_KEYS:
                if document.setdefault(key, value) != value:
                    fault = f"two texts of one picture: {key} stays one text, and row {row.number} has another"
                continue
            before = document.setdefault(key, [])
            assert isinstance(before, list)
            before += [value] if isinstance(value, str) else value
    unread = tuple(name for row in rows for name in row.unread)
    numbers = tuple(row.number for row in rows[1:])
    return rows[0]._replace(document=document, fault=fault, unread=unread, joined=numbers)
