"""Which K texts of a sample's caption document become its caption views.

The document is the sample's json: DreamLIP's seven lists of sentences, PixelProse's original and generated caption, or
a plain `caption`, which stands for a raw caption.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from cosmos_scale.config_data import CaptionsConfig
from cosmos_scale.data.plan import CAPTION_STREAM, sample_generator
from cosmos_scale.data.sample import DamagedSample, SampleKey

RAW_KEYS = ("raw_caption",)
SHORT_KEYS = ("shortIB_captions", "shortSV_captions", "shortLLA_captions")
LONG_KEYS = ("longIB_captions", "longSV_captions", "longLLA_captions")
# The order of the keys is the order of the pool, as in the published code.
POOL_KEYS: dict[str, tuple[str, ...]] = {
    "textcrop": RAW_KEYS + SHORT_KEYS + LONG_KEYS,
    "random": RAW_KEYS + SHORT_KEYS + LONG_KEYS,
    "raw": RAW_KEYS,
    "short": RAW_KEYS + SHORT_KEYS,
    "long": LONG_KEYS,
}

# Abbreviations by what follows them: always more of the sentence; a number; or possibly a new sentence, as after an
# acronym, if it opens with one of the words below. Those that are words too ("co", "mar", "col") are left out.
LEADING = {"mr", "mrs", "ms", "dr", "prof", "mt", "rev", "hon", "gen", "capt", "lt", "sgt", "gov", "sen", "rep"} | {
    *("vs", "ca", "cf", "approx", "e.g", "i.e")
}
NUMBERING = {"no", "nos", "vol", "fig", "p", "pp"}
TRAILING = {"jr", "sr", "inc", "ltd", "corp", "ave", "st", "ft"}
STARTERS = {"A", "An", "The", "It", "In", "On", "At", "There", "This", "That", "These", "Those"} | {
    *("He", "She", "They", "We", "I", "His", "Her", "Its", "Their")
}
OPENING = "\"'\u201c\u2018\u00ab(["
CLOSING = "\"'\u201d\u2019\u00bb)\\]"
# A terminator with closing quotes or brackets, and the space after it; the full-width CJK ones need no space.
SENTENCE_END = re.compile(rf"(?P<mark>[.!?\u2026]+[{CLOSING}]*)\s+|(?P<cjk>[\u3002\uff01\uff1f]+[\u300d\u300f\u201d]*)")
ACRONYM = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")


def draw_captions(config: CaptionsConfig, document: dict[str, Any], key: SampleKey) -> list[str]:
    """Draw `config.count` texts, global captions first, from a sample's caption document.

    Raises DamagedSample where the document has the wrong shape or holds no text for this sampling mode.
    """
    pool = caption_pool(config.sampling, document)
    if not any(sentence.strip() for sentence in pool):
        raise DamagedSample(f"no caption text for sampling {config.sampling} in keys {_keys(document)}")
    generator = sample_generator(key, CAPTION_STREAM)
    if config.sampling not in ("textcrop", "textcrop_pixelprose"):
        return _choose(pool, config.count, generator)
    # Both sentence counts come before any sentence, as published: the law is the same, but it is easier to compare.
    counts = [1 + int(u * config.max_sentences) for u in generator.random(config.global_count)]
    global_captions = [". ".join(_choose(pool, count, generator)) for count in counts]
    return global_captions + _choose(pool, config.count - config.global_count, generator)


def split_sentences(text: str) -> list[str]:
    """Split running text into sentences, without their closing full stops.

    Decimal numbers, initials, acronyms and common abbreviations do not end a sentence. `!` and `?` stay, full stops go,
    because global captions join sentences with ". ".
    """
    sentences = []
    for line in text.splitlines():
        start = 0
        for end in SENTENCE_END.finditer(line):
            if end["cjk"] is None and not _ends_sentence(line[start : end.start()], end["mark"], line[end.end() :]):
                continue
            sentences.append(line[start : end.end()])
            start = end.end()
        sentences.append(line[start:])
    return [bare for bare in map(_without_full_stop, sentences) if bare]


def caption_pool(sampling: str, document: Any) -> list[str]:
    """Return the sentences that a sampling mode chooses from; they may be blank. Raises DamagedSample."""
    if not isinstance(document, dict):
        raise DamagedSample(f"caption document is {_kind(document)}, expected an object with caption keys")
    if sampling in POOL_KEYS:
        keys = POOL_KEYS[sampling]
        if "raw_caption" in keys and _is_plain(document):
            keys = ("caption",)
        _require_any(keys, document, sampling)
        return [sentence for name in keys for sentence in _sentences(document, name)]
    if sampling == "raw_pixelprose":
        _require_any(("original_caption",), document, sampling)
        return _text(document, "original_caption")
    _require_any(("original_caption", "caption"), document, sampling)
    generated = "".join(_text(document, "caption"))
    pieces = re.split(r"\n|</s>|\.", generated)
    return _text(document, "original_caption") + [piece.strip() for piece in pieces if piece.strip()]


def _is_plain(document: dict[str, Any]) -> bool:
    """Whether `caption` is all the text there is: nothing of DreamLIP, and not PixelProse's generated caption."""
    others = (*POOL_KEYS["textcrop"], "original_caption")
    return document.get("caption") is not None and all(document.get(name) is None for name in others)


def _require_any(keys: Sequence[str], document: dict[str, Any], sampling: str) -> None:
    if all(document.get(name) is None for name in keys):
        raise DamagedSample(f"sampling {sampling} needs one of {', '.join(keys)}; the document has {_keys(document)}")


def _sentences(document: dict[str, Any], name: str) -> list[str]:
    """One key of the pool: a list of sentences as it is, a plain string split into sentences, nothing where absent."""
    value = document.get(name)
    if value is None:
        return []
    if isinstance(value, str):
        return split_sentences(value)
    if not isinstance(value, list):
        raise DamagedSample(f"{name} is {_kind(value)}, expected a list of sentences or a string")
    for position, sentence in enumerate(value):
        if not isinstance(sentence, str):
            raise DamagedSample(f"{name}[{position}] is {_kind(sentence)}, expected a string")
    return value


def _text(document: dict[str, Any], name: str) -> list[str]:
    """One PixelProse key: its string in a list, empty where absent."""
    value = document.get(name)
    if value is None:
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


def _ends_sentence(before: str, mark: str, after: str) -> bool:
    """Whether the mark between `before` and `after` closes a sentence."""
    if not mark.startswith(".") or not before.strip() or not after.strip():
        return True
    word = before.split()[-1].lstrip(OPENING)
    next_word = after.split()[0].rstrip(",")
    if mark.startswith("...") or word.lower() == "etc":
        return next_word[0].isupper()
    if word.lower() in LEADING:
        return False
    if word.lower() in NUMBERING:
        return not next_word[0].isdigit()
    if len(word) == 1:  # an initial, but "plan A" may end a sentence
        return not (word.isalpha() and word.isupper()) or next_word in STARTERS
    if word.lower() in TRAILING or ACRONYM.fullmatch(word):
        return next_word in STARTERS
    return True


def _without_full_stop(sentence: str) -> str:
    bare = sentence.strip()
    last_word = bare.split()[-1] if bare else ""
    if ACRONYM.fullmatch(last_word.removesuffix(".")) and last_word.count(".") > 1:
        return bare
    return bare.rstrip(".\u3002").rstrip()


def _keys(document: dict[str, Any]) -> str:
    return ", ".join(map(str, document)) or "no keys"


def _kind(value: Any) -> str:
    """A value's type as the user wrote it, in json's words."""
    if value is None:
        return "null"
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
