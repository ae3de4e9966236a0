"""Which keys of a sample's json hold captions: the known keys, other datasets' names for captions, what is none."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cosmos_scale.data.samples.sentences import END_TOKEN, split_sentences

RAW_KEYS = ("raw_caption",)
SHORT_KEYS = ("shortIB_captions", "shortSV_captions", "shortLLA_captions")
LONG_KEYS = ("longIB_captions", "longSV_captions", "longLLA_captions")
DREAMLIP_KEYS = RAW_KEYS + SHORT_KEYS + LONG_KEYS
KNOWN_KEYS = (*DREAMLIP_KEYS, "original_caption", "caption")
# Captions that stay one string, never a list: an alternative text of the web may have any form.
WHOLE_KEYS = frozenset({"original_caption"})
# The known keys by their names in plain form. vlm_caption: PixelProse's parquet files call the generated caption so.
KNOWN_NAMES = {name.lower(): name for name in DREAMLIP_KEYS} | {
    "original_caption": "original_caption",
    "vlm_caption": "caption",
    "caption": "caption",
}
# Names of captions in other datasets, in order of preference: read only where there is no known key.
OTHER_NAMES = ("captions", "text", "title")
# Names that tables give to further captions of a picture: caption_2, blip_caption, text1, and caption.1, pandas' name
# for a second column `caption`.
_FURTHER = re.compile(r"(?:.*_)?captions?(?:_.*)?|(?:captions?|text|title)[_.-]?[0-9]+")
# Signs that show nothing, and that `strip` leaves: a zero-width space, joiners, the byte order mark, a soft hyphen.
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"))


def plain_column(name: str) -> str:
    """Return the name of a column or json key in the form in which names are compared."""
    return name.strip().lower().replace(" ", "_")


def is_missing(value: object) -> bool:
    """Return whether a value of a caption document means that there is none: null, or NaN, pandas' empty cell."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def has_text(value: object) -> bool:
    """Return whether a value is a caption: a string that is not blank, or a list with one."""
    texts = value if isinstance(value, list) else [value]
    return any(isinstance(text, str) and text.strip() for text in texts)


def may_be_caption(name: str, value: object) -> bool:
    """Return whether a column, named in plain form, is called as captions are or much like it, and holds a text."""
    if name in KNOWN_NAMES or name in OTHER_NAMES:
        return has_text(value)
    return _is_further(name, value)


def further_captions(document: Mapping[str, Any]) -> list[str]:
    """Return the keys of a sample's json that hold text, and are called much like captions but not as those are."""
    return [name for name, value in document.items() if not _called_caption(name) and _is_further(name.lower(), value)]


def _is_further(name: str, value: object) -> bool:
    # The value of caption_id is a number, which in a CSV file is a text without a letter.
    return bool(_FURTHER.fullmatch(name)) and has_text(value) and any(map(str.isalpha, str(value)))


def holds_caption(name: str, value: object) -> bool:
    """Return whether a value under a key is a caption from which sentences can be drawn."""
    return has_text(value) and not _lacks_sentence(name, value)


def is_empty(value: object) -> bool:
    """Return whether a value holds no caption, though its type is right: null, NaN, a blank string, a list of these."""
    values = value if isinstance(value, list) else [value]
    return all(is_missing(item) or (isinstance(item, str) and not item.strip()) for item in values)


def caption_keys(document: Mapping[str, Any]) -> list[str]:
    """Return the keys of a sample's json that are called as captions are called and hold text, as they stand there."""
    return [name for name, value in document.items() if _called_caption(name) and has_text(value)]


def name_clash(document: Mapping[str, Any]) -> str | None:
    """Return which two keys with text mean one known key (`Caption`, `CAPTION`), where none is written as that key."""
    if any(has_text(document.get(key)) for key in KNOWN_KEYS):
        return None
    met: dict[str, str] = {}
    for name in caption_keys(document):
        plain = plain_column(name)
        before = met.setdefault(KNOWN_NAMES.get(plain, plain), name)
        if before != name:
            return f"two keys of one name: {before}, {name}"
    return None


def with_known_keys(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document with its captions under known keys; see `name_clash` for what would leave one out.

    A document that has a caption under a known key stays as it is. Otherwise known keys in other letters (`Caption`)
    count, and where there is none of these either, the first of captions, text and title becomes `caption`.
    """
    if any(has_text(document.get(key)) for key in KNOWN_KEYS):
        return document
    plain = {plain_column(name): document[name] for name in caption_keys(document)}
    known = {KNOWN_NAMES[name]: value for name, value in plain.items() if name in KNOWN_NAMES}
    other = next(({"caption": plain[name]} for name in OTHER_NAMES if name in plain), {})
    return {**document, **(known or other)} if plain else document


def caption_fault(document: dict[str, Any], keys: Sequence[str] = ()) -> str | None:
    """Return why a document has no caption, whatever the sampling; None where it has one, or may have one.

    keys: the only keys that count, if the user names any. Without them a document of foreign keys may have a caption:
    a run's `data.captions.keys` may name one of these. A caption of a wrong type is left to the sampling.
    """
    other_keys = "" if keys else "; --captions KEY names other keys"
    texts = [name for name in keys or caption_keys(document) if has_text(document.get(name))]
    if texts and all(_lacks_sentence(name, document[name]) for name in texts):
        return f"no caption: no sentence in {', '.join(texts)}{other_keys}"
    if texts:
        return None if keys else name_clash(document)
    named = [name for name in document if (name in keys if keys else _called_caption(name))]
    if named and all(is_empty(document[name]) for name in named):
        shown = ", ".join(f"{name} is {'null' if is_missing(document[name]) else 'empty'}" for name in named)
        return f"no caption: {shown}{other_keys}"
    if keys and not named:
        return f"no caption: it lacks {', '.join(keys)} and has {', '.join(document) or 'no keys'}"
    return None


def _lacks_sentence(name: str, value: object) -> bool:
    """Whether a text under a key is one string, split into sentences when captions are drawn, and has none: "..."."""
    if not isinstance(value, str) or plain_column(name) in WHOLE_KEYS:
        return False
    has_letter = any(map(str.isalnum, value.replace(END_TOKEN, "")))  # the first letter settles most texts
    return not has_letter and not split_sentences(value.translate(_INVISIBLE))


def _called_caption(name: str) -> bool:
    plain = plain_column(name)
    return plain in KNOWN_NAMES or plain in OTHER_NAMES
