"""Running text to sentences: by rules for English captions, as the published code does it, or not at all.

`tests/data/samples/test_sentences.py` began with 63 hard cases. The public libraries solve fewer of them: blingfire
0.1.8 solves 50, pysbd 0.3.4 53, syntok 1.4.4 54, sentencex 1.0.32 55. Each cuts file names, list numbers or "vol. 2".
"""

import re
from collections.abc import Callable, Iterator
from typing import Literal

Split = Literal["sentences", "published", "none"]

# Abbreviations, in three kinds by what follows them. LEADING: the sentence always goes on. NUMBERING: a number.
# TRAILING: possibly a new sentence, as after an acronym, if it opens with one of the STARTERS. Abbreviations that are
# words too ("co", "col") are left out.
LEADING = {"mr", "mrs", "ms", "dr", "prof", "mt", "rev", "hon", "gen", "capt", "lt", "sgt", "gov", "sen", "rep"} | {
    *("vs", "ca", "cf", "approx", "e.g", "i.e")
}
NUMBERING = {"no", "nos", "vol", "fig", "p", "pp", "est"} | {
    *("jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec")
}
TRAILING = {"jr", "sr", "inc", "ltd", "corp", "ave", "st", "ft"}
COMPANIES = {"inc", "ltd", "corp", "co", "llc"}  # the stop before one of these ends no sentence
UNITS = {"in", "ft", "oz", "lb", "lbs", "sq", "hr", "min", "sec"}  # after a number
STARTERS = {
    *("A", "An", "The", "It", "In", "On", "At", "To", "From", "With", "There", "This", "That", "These", "Those"),
    *("He", "She", "They", "We", "You", "I", "His", "Her", "Its", "Their", "Some", "Each", "Both", "Several"),
    *("Another", "Behind", "Above", "Below", "Beside", "Next", "Then", "When", "While", "As", "One", "Two", "Three"),
}
OPENING = "\"'\u201c\u2018\u00ab(["
CLOSING = "\"'\u201d\u2019\u00bb)\\]"
# A sentence ends in three ways. mark: a terminator with closing quotes or brackets, and the space after it (spaced dots
# are one ellipsis). cjk: full-width terminators, which need no space. glued: a full stop with no space after it, if one
# of the STARTERS comes next; "Node.js", "IMG_1.JPG" and "example.com" stay whole.
SENTENCE_END = re.compile(
    rf"(?P<mark>[.!?\u2026]+(?:\s+\.(?=\s|$))*[{CLOSING}]*)\s+"
    r"|(?P<cjk>[\u3002\uff01\uff1f]+[\u300d\u300f\u201d]*)"
    rf"|(?P<glued>(?<=[a-z0-9{CLOSING}])\.(?=(?:{'|'.join(sorted(STARTERS))})\s))"
)
# Where an end may be. Of a run of terminators only the first is tried: trying each in a run of 100,000 takes minutes.
TERMINATORS = re.compile(r"[.!?\u2026]+|[\u3002\uff01\uff1f]+")
ACRONYM = re.compile(r"(?:[A-Z][a-z]\.|[^\W\d_]\.)*[^\W\d_]")
FIRST_WORD = re.compile(r"\S{1,40}")
# A quotation mark that opens or closes; after a digit it means inches.
QUOTE = re.compile(r'(?<!\d)"|\u201c|\u201d')
_LOOK_BACK = 80  # characters before a mark that are read for its word
_LONGEST_QUOTE = 300  # characters; a quotation mark that is not closed within them is a stray mark
END_TOKEN = "</s>"  # some generated captions contain it
PUBLISHED_END = re.compile(rf"\n|{END_TOKEN}|\.")


def splitter(split: Split) -> Callable[[str], list[str]]:
    """Return the function that turns one caption into the list of its sentences."""
    return {"sentences": split_sentences, "published": split_published, "none": _whole}[split]


def split_published(text: str) -> list[str]:
    """Split as the published code does: at every full stop, line break and `</s>`, also inside "3.5"."""
    return [piece for piece in map(str.strip, PUBLISHED_END.split(text)) if piece]


def split_sentences(text: str) -> list[str]:
    """Split running text into sentences, without their closing full stops.

    Decimal numbers, initials, acronyms, common abbreviations, ellipses, addresses, file names and full stops inside
    quotation marks do not end a sentence. `!` and `?` stay, full stops go, because global captions join sentences
    with ". ".
    """
    sentences = []
    for line in text.replace(END_TOKEN, "\n").splitlines():
        start = counted = quotes = 0
        for end in _ends(line):
            quotes += len(QUOTE.findall(line, counted, end.end()))
            counted = end.end()
            if end["mark"] is not None and not _ends_sentence(line, start, end):
                continue
            if quotes % 2 and QUOTE.search(line, counted, counted + _LONGEST_QUOTE):
                continue  # inside a quotation
            sentences.append(line[start:counted])
            start, quotes = counted, 0
        sentences.append(line[start:])
    return [bare for bare in map(_without_full_stop, sentences) if bare]


def _whole(text: str) -> list[str]:
    return [text.strip()] if text.strip() else []


def _ends(line: str) -> Iterator[re.Match[str]]:
    """Yield the marks that may end a sentence."""
    position = 0
    while (run := TERMINATORS.search(line, position)) is not None:
        end = SENTENCE_END.match(line, run.start())
        position = run.end() if end is None else end.end()
        if end is not None:
            yield end


def _ends_sentence(line: str, start: int, end: re.Match[str]) -> bool:
    """Whether a mark that spaces follow closes the sentence that began at `start`."""
    mark = end["mark"]
    before = line[max(start, end.start() - _LOOK_BACK) : end.start()].split()
    next_match = FIRST_WORD.match(line, end.end())
    if not before or next_match is None:
        return True
    word, next_word = before[-1].lstrip(OPENING), next_match[0].rstrip(",")
    if not next_word:
        return False  # a comma on its own
    if mark[-1] in CLOSING and next_word[0].islower():
        return False  # the sentence goes on after the quotation
    if next_word.rstrip(".").lower() in COMPANIES:
        return False
    if not mark.startswith((".", "\u2026")):
        return True
    if mark.count(".") > 2 or "\u2026" in mark or word.lower() == "etc":
        return next_word[0].isupper()
    return _ends_after(word, next_word, before)


def _ends_after(word: str, next_word: str, before: list[str]) -> bool:
    """Whether a full stop after `word` (the last of `before`) and ahead of `next_word` closes the sentence."""
    name = word.lower()
    if name in LEADING:
        return False
    if name in NUMBERING or word == "c":
        return not next_word[0].isdigit()
    if name in UNITS and len(before) > 1 and before[-2][-1].isdigit() and next_word[0].islower():
        return False
    if word.isdigit() and len(before) == 1 and len(word) < 4:
        return False  # a list's number
    if word == "1" and before[-2].endswith(":"):
        return False  # the first of a list
    if len(word) == 1:  # an initial, but "plan A" may end a sentence
        return not (word.isalpha() and word.isupper()) or next_word in STARTERS
    if name in TRAILING or ACRONYM.fullmatch(word):
        return next_word in STARTERS
    return True


def _without_full_stop(sentence: str) -> str:
    bare = sentence.strip()
    last_word = bare.rsplit(maxsplit=1)[-1] if bare else ""
    if ACRONYM.fullmatch(last_word.removesuffix(".")) and last_word.count(".") > 1:
        return bare
    return bare.rstrip(". \t\u3002")
