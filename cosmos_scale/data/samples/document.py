"""JSON that users give, read and written so that nothing in it is lost or changed without a word.

Python's reader keeps the last value of a key that stands twice, and takes half of a surrogate pair (`\\ud83d` alone),
which no file can hold as text. A sample with either of these is damaged.
"""

import json
import re
from typing import Any

from cosmos_scale.data.samples.sample import DamagedSample

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(data: bytes) -> Any:
    """Parse json text of any encoding that json may have, with or without a mark at its beginning.

    Escapes of both halves of a surrogate pair are joined. Raises: ValueError or RecursionError where it is no json,
    where a key stands twice in one object, and where half of a surrogate pair stands alone.
    """
    text = data.decode(json.detect_encoding(data))
    value = json.loads(text, object_pairs_hook=_without_repeats)
    if _ESCAPED_SURROGATE.search(text):
        _encode(value)
    return value


def encode_document(document: Any) -> bytes:
    """Return a document as UTF-8 json; raises DamagedSample where a text holds half of a surrogate pair."""
    try:
        return _encode(document)
    except ValueError as error:
        raise DamagedSample(f"not text: {error}") from error


def _encode(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        half, before = ord(text[error.start]), text[max(0, error.start - 20) : error.start]
        raise ValueError(f"half of a surrogate pair, \\u{half:04x}, stands alone behind {before!r}") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} stands twice in one object")
    return values
