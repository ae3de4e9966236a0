"""OpenCLIP's tokenizer, id for id, with its byte-pair merging in Rust.

The Python packages that OpenCLIP uses clean the text and cut it into words. The same pattern in Rust would follow
another Unicode version and cut thousands of recent letters differently. Words recur, so each word is merged once and
remembered. The vocabulary is a file of the package open-clip-torch; the package itself is not imported.
"""

import gzip
import html
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import ftfy
import numpy as np
import regex
import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from torch import Tensor

from cosmos_scale.config import TOKENIZER_VOCABULARY
from cosmos_scale.errors import UserError
from cosmos_scale.files import regular_only

START_OF_TEXT, END_OF_TEXT = TOKENIZER_VOCABULARY - 2, TOKENIZER_VOCABULARY - 1
VOCABULARY_PACKAGE = "open_clip"
VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
# The vocabulary has 256 bytes, the same at a word's end, merges, and 2 special words. The file holds more merges.
MERGES = TOKENIZER_VOCABULARY - 2 * 256 - 2
SPECIAL_WORDS = {"<start_of_text>": [START_OF_TEXT], "<end_of_text>": [END_OF_TEXT]}
WORD = regex.compile(
    "|".join(SPECIAL_WORDS) + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
# WORD for cleaned ASCII text, whose only white space is blanks: the standard library is twice as fast.
ASCII_WORD = re.compile("|".join(SPECIAL_WORDS) + r"|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^ a-z0-9]+")
# Bounds of what a process remembers: about 10 MB of words.
REMEMBERED_WORDS, REMEMBERED_LENGTH = 65_536, 32
# Mending goes line by line, at some 10 microseconds each. It changes neither blank lines nor plain line breaks.
_BREAKS = str.maketrans("\n\r\t", "   ")
_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")


class WordPieces(NamedTuple):
    """A word as a model reads it, and the parts that its ids stand for. U+FFFD: bytes that are no UTF-8 by themselves.

    One letter may have several ids, so parts may hold U+FFFD where the whole word holds none.
    """

    word: str
    parts: tuple[str, ...]


class Tokenizer:
    """Turns captions into rows of ids: start, the text's ids, EOT, zeros.

    Works the same before and after a fork and after pickling (the vocabulary is read again, not sent); uses no threads.
    """

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self._merge = _word_merger()
        self._ids = dict(SPECIAL_WORDS)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[int]]:
        return Tokenizer, (self.context_length,)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return ids [N, L] int32; a longer text keeps its first L - 1 ids, the start included, and EOT."""
        rows = np.zeros((len(texts), self.context_length), dtype=np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = self._encode(text, self.context_length - 2)
            row[0], row[1 : 1 + len(ids)], row[1 + len(ids)] = START_OF_TEXT, ids, END_OF_TEXT
        return torch.from_numpy(rows)

    def pieces(self, text: str) -> list[WordPieces]:
        """Return the words of a text as the model reads them, each with the parts that its ids stand for.

        All parts together are as many as the ids of `__call__` between start and EOT.
        """
        room, found = self.context_length - 2, []
        byte_of = _byte_of_letter()
        for word in words(clean(text)):
            if word in SPECIAL_WORDS:
                parts = [word.encode()]
            else:
                letters = [part.removesuffix("</w>") for part in self._merge.encode(word).tokens]
                parts = [bytes(byte_of[letter] for letter in part) for part in letters]
            if kept := parts[:room]:
                whole = b"".join(kept).decode(errors="replace")
                found.append(WordPieces(whole, tuple(part.decode(errors="replace") for part in kept)))
            room -= len(kept)
        return found

    def _encode(self, text: str, most: int) -> list[int]:
        """Return the first ids of a text, `most` or fewer, without start and EOT; words behind them are not merged."""
        ids: list[int] = []
        for word in words(clean(text)):
            known = self._ids.get(word)
            if known is None:
                known = self._merge.encode(word).ids
                if len(word) <= REMEMBERED_LENGTH:
                    if len(self._ids) >= REMEMBERED_WORDS:
                        self._ids = dict(SPECIAL_WORDS)
                    self._ids[word] = known
            ids += known
            if len(ids) >= most:  # a caption may hold a megabyte, such as a picture in base64
                break
        return ids[:most]


def clean(text: str) -> str:
    """Return text with broken Unicode mended, HTML entities resolved twice, white space collapsed, in lower case."""
    # Mending and resolving take longer than all the rest, and change nothing in printable ASCII without an entity.
    if not (text.isascii() and text.translate(_BREAKS).isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(_BLANK_LINES.sub("\n", text))))
    return " ".join(text.split()).lower()


def words(cleaned: str) -> list[str]:
    """Cut cleaned text into words; byte pairs are merged inside a word only."""
    found: list[str] = (ASCII_WORD if cleaned.isascii() else WORD).findall(cleaned)
    return found


@lru_cache(maxsize=1)
def _word_merger() -> tokenizers.Tokenizer:
    """Build the byte-pair encoder of single words, once a process."""
    vocabulary, merges = byte_pairs()
    merger = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    merger.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return merger


def byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the ids of CLIP's words, without the two special ones, which come next, and the merges in their order.

    Raises UserError where the vocabulary's file is missing.
    """
    package = find_spec(VOCABULARY_PACKAGE)  # finds the folder without running the package, whose import takes seconds
    if package is None or not package.submodule_search_locations:
        raise UserError("open-clip-torch: not installed, but its vocabulary is needed: pip install open-clip-torch")
    path = Path(package.submodule_search_locations[0]) / VOCABULARY_FILE
    if not path.is_file():
        raise UserError(f"{path}: missing, though the installed open-clip-torch should bring this vocabulary")
    with open(path, "rb", opener=regular_only) as file:
        lines = gzip.decompress(file.read()).decode().split("\n")[1 : MERGES + 1]  # the first line is a version
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *(first + second for first, second in merges)]
    return {word: identity for identity, word in enumerate(words)}, merges


def _byte_letters() -> list[str]:
    """Return the letter that stands for each byte, in the order of their ids: GPT-2's byte-level alphabet.

    Visible Latin-1 characters stand for themselves and come first; the other bytes take letters from 256 on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(code) for code in [*visible, *range(256, 512 - len(visible))]]


def _byte_of_letter() -> dict[str, int]:
    """Return the byte that each letter of `_byte_letters` stands for; bytes without a visible letter are in order."""
    visible = [ord(letter) for letter in _byte_letters() if ord(letter) < 256]
    hidden = sorted(set(range(256)).difference(visible))
    return dict(zip(_byte_letters(), [*visible, *hidden], strict=True))
