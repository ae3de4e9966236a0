"""Which K texts of a sample's caption document become its caption views.

The document is the sample's json: DreamLIP's seven lists of sentences, PixelProse's original and generated caption, or
a plain `caption`, which stands for a raw caption.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cosmos_scale.config import CaptionsConfig
from cosmos_scale.data.samples.caption_keys import (
    DREAMLIP_KEYS,
    LONG_KEYS,
    OTHER_NAMES,
    RAW_KEYS,
    SHORT_KEYS,
    is_empty,
    is_missing,
    name_clash,
    with_known_keys,
)
from cosmos_scale.data.samples.sample import CAPTION_STREAM, DamagedSample, SampleKey, sample_generator
from cosmos_scale.data.samples.sentences import split_published, split_sentences

# The order of the keys is the order of the pool, as in the published code.
POOL_KEYS: dict[str, tuple[str, ...]] = {
    "textcrop": DREAMLIP_KEYS,
    "random": DREAMLIP_KEYS,
    "raw": RAW_KEYS,
    "short": RAW_KEYS + SHORT_KEYS,
    "long": LONG_KEYS,
}


def draw_captions(config: CaptionsConfig, document: dict[str, Any], key: SampleKey) -> list[str]:
    """Draw `config.count` texts, global captions first, from a sample's caption document.

    Raises DamagedSample where the document has the wrong shape or holds no text for this sampling mode.
    """
    pool = caption_pool(config.sampling, document, config.keys)
    if not any(sentence.strip() for sentence in pool):
        raise DamagedSample(f"no caption text for sampling {config.sampling} in keys {_keys(document)}")
    generator = sample_generator(key, CAPTION_STREAM)
    if config.sampling not in ("textcrop", "textcrop_pixelprose"):
        return _choose(pool, config.count, generator)
    # Both sentence counts are drawn before any sentence, as in the published code. Another order would follow the same
    # law, but this order is easier to compare.
    counts = [1 + int(u * config.max_sentences) for u in generator.random(config.global_count)]
    global_captions = [". ".join(_choose(pool, count, generator)) for count in counts]
    return global_captions + _choose(pool, config.count - config.global_count, generator)


def caption_pool(sampling: str, document: Any, keys: Sequence[str] | None = None) -> list[str]:
    """Return the sentences that a sampling mode chooses from; they may be blank. Raises DamagedSample.

    keys: the only json keys that are read, if the run names any; None: the keys of the sampling mode.
    """
    if not isinstance(document, dict):
        raise DamagedSample(f"caption document is {_kind(document)}, expected an object with caption keys")
    if keys is not None:
        _require_any(keys, document, "data.captions.keys")
        return [sentence for name in keys for sentence in _sentences(document, name)]
    if clash := name_clash(document):
        raise DamagedSample(clash)
    known, mode = with_known_keys(document), f"sampling {sampling}"
    if sampling in POOL_KEYS:
        names = POOL_KEYS[sampling]
        if "raw_caption" not in names:
            _require_any(names, known, mode)
        elif _is_plain(known):
            names = ("caption",)
        else:
            _require_any(names, known, mode, ("caption", *OTHER_NAMES))
        return [sentence for name in names for sentence in _sentences(known, name)]
    if sampling == "raw_pixelprose":
        _require_any(("original_caption",), known, mode)
        return _text(known, "original_caption")
    _require_any(("original_caption", "caption"), known, mode, OTHER_NAMES)
    # A string is split in the published way. A list was split when the shards were made.
    return _text(known, "original_caption") + _sentences(known, "caption", split_published)


def _is_plain(document: dict[str, Any]) -> bool:
    """Whether `caption` is all the text there is: nothing of DreamLIP, and not PixelProse's generated caption."""
    others = (*DREAMLIP_KEYS, "original_caption")
    return not is_missing(document.get("caption")) and all(is_empty(document.get(name)) for name in others)


def _require_any(keys: Sequence[str], document: dict[str, Any], who: str, others: Sequence[str] = ()) -> None:
    """Raise DamagedSample where a document has none of some keys. others: keys that stand in for all of them."""
    if all(is_missing(document.get(name)) for name in keys):
        instead = f", or else {', '.join(others)}" if others else ""
        raise DamagedSample(f"{who} needs one of {', '.join(keys)}{instead}; the document has {_keys(document)}")


def _sentences(document: dict[str, Any], name: str, split: Callable[[str], list[str]] = split_sentences) -> list[str]:
    """One key of the pool: a list of sentences as it is, a plain string split into sentences, nothing where absent."""
    value = document.get(name)
    if is_missing(value):
        return []
    if isinstance(value, str):
        return split(value)
    if not isinstance(value, list):
        raise DamagedSample(f"{name} is {_kind(value)}, expected a list of sentences or a string")
    for position, sentence in enumerate(value):
        if not isinstance(sentence, str):
            raise DamagedSample(f"{name}[{position}] is {_kind(sentence)}, expected a string")
    return value


def _text(document: dict[str, Any], name: str) -> list[str]:
    """One PixelProse key: its string in a list, empty where absent."""
    value = document.get(name)
    if is_missing(value):
        return []
    if not isinstance(value, str):
        raise DamagedSample(f"{name} is {_kind(value)}, expected a string")
    return [value]


def _choose(pool: list[str], count: int, generator: np.random.Generator) -> list[str]:
    """Take `count` sentences in random order; where the pool is too small, whole pools first, then random ones."""
    n = len(pool)
    whole, rest = (0, count) if count <= n else divmod(count, n)
    order = np.argsort(generator.random(n), kind="stable")
    return pool * whole + [pool[position] for position in order[:rest]]


def _keys(document: dict[str, Any]) -> str:
    return ", ".join(map(str, document)) or "no keys"


def _kind(value: Any) -> str:
    """A value's type as the user wrote it, in json's words."""
    if is_missing(value):
        return "null"
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
