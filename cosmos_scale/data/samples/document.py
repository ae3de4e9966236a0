"""JSON that users give, read and written so that nothing in it is lost or changed without a word.

Python's reader keeps the last value of a key that stands twice, so it is not used alone. It also takes half of a
surrogate pair (`\\ud83d` alone), which no file can hold as text: nothing is written that has one. Shards of others may
have one; cleaning captions for the tokenizer puts U+FFFD in its place, as in the published code.
"""

import json
import re
from typing import Any

from cosmos_scale.data.samples.sample import DamagedSample

# NUL as json spells it, and not a backslash, itself escaped, before the letters u0000.
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def parse_json(data: bytes) -> Any:
    """Parse json text of any encoding that json may have, with or without a mark at its beginning.

    Escapes of both halves of a surrogate pair are joined. Raises: ValueError or RecursionError where it is no json, and
    where a key stands twice in one object.
    """
    return json.loads(data, object_pairs_hook=_without_repeats)


def encode_document(document: Any) -> bytes:
    """Return a document as UTF-8 json; raises DamagedSample where a text holds NUL or half of a surrogate pair."""
    text = json.dumps(document, ensure_ascii=False)
    if _NUL.search(text):
        raise DamagedSample("not text: NUL in it")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        half, before = ord(text[error.start]), text[max(0, error.start - 20) : error.start]
        reason = f"half of a surrogate pair, \\u{half:04x}, stands alone behind {before!r}"
        raise DamagedSample(f"not text: {reason}") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} stands twice in one object")
    return values
