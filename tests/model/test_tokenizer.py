"""Token ids against open_clip's own tokenizer, which is slower and runs Python at every merge."""

import multiprocessing
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable

import ftfy
import numpy as np
import open_clip.tokenizer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_scale.errors import UserError
from cosmos_scale.model.tokenizer import WORD, Tokenizer, _word_merger, clean, words
from tests.model.models import ids_as_array

LENGTH = 77

# Look-alike letters are on purpose. Up to three of these are mixed into captions of English words.
# ruff: noqa: RUF001
ODDITIES = [
    "café crème brûlée, à la carte", "naïve façade", "Ærøskøbing", "Straße", "İstanbul ıI", "Cafe\u0301", "ﬁnal ﬂight",
    "一只黑猫坐在窗台上", "東京タワーの夜景。", "서울의 봄", "ｆｕｌｌ　ｗｉｄｔｈ", "ภาษาไทย", "שלום", "مرحبا ١٢٣",
    "हिन्दी १२", "Привет, мир!", "Ⅷ ½ ² 42",
    "😀", "👩‍👩‍👧‍👦 family", "🇩🇪🇫🇷", "❤️‍🔥!!", "👍🏽...", "✈️→🏝",
    "&amp;", "&amp;amp;lt;b&amp;amp;gt;", "&lt;p&gt;R&amp;D&lt;/p&gt;", "&quot;quoted&quot;", "&#39;s",
    "&eacute;t&eacute;", "&nbsp;&nbsp;x", "&#x1F600;", "&bogus; & co", "<b>bold &amp; red</b>", "&#31;&#x85;", "&lt",
    "it's we've you'll I'm they'd don't he're", "IT'S", "it’s “quoted” – dash…", "'ſ 'S", "rock'n'roll", "AT&T",
    "<start_of_text>", "a<end_of_text>b", "<END_OF_TEXT>", "!!<end_of_text>", "<ſtart_of_text>", "<|endoftext|>",
    "cafÃ© schÃ¶n", "donâ€™t", "\x1b[31mred\x1b[0m", "\x00nul\x07bell", "tab\tand\nline\r\nend",
    "a\u2028b\u2029c\x85d", "zero\u200bwidth\ufeff", "soft\u00adhyphen", "under_score #hash @name", "a/b\\c",
    "https://example.com/x?y=1&z=2", "$1,299.99 (50% off)", "-----", "!?!?!?", "''''", "a" * 43,
    "x" * 300, "word " * 200, "é" * 120, "漢" * 100, "😀" * 90, "1234567890" * 12,
    # Letters and digits that Unicode gained in versions 15 to 17: the Rust pattern engine does not know them all.
    "\U00031350\U0002ebf0 \u0c5c \ua7ce \U00010940", "\U00011de0\U00011de1 5", "", " ", "  \n ", ".",
]  # fmt: skip


def captions(count: int) -> list[str]:
    """Return captions of 0 to 60 English words in mixed case, each with up to three oddities between them."""
    draw = random.Random(0)
    merges = open_clip.tokenizer.SimpleTokenizer().encoder
    words = [word[:-4] for word in merges if word.endswith("</w>") and len(word) > 6]
    texts = []
    for number in range(count):
        parts = draw.choices(words, k=draw.choice([0, 1, 5, 8, 12, 20, 30, 60]))
        parts = [draw.choice([str.lower, str.upper, str.title])(part) for part in parts]
        for _ in range(draw.choice([0, 0, 1, 1, 2, 3])):
            parts.insert(draw.randrange(len(parts) + 1), draw.choice(ODDITIES))
        texts.append(
            draw.choice([" ", "  ", ", ", "-", ""]).join(parts) if number >= len(ODDITIES) else ODDITIES[number]
        )
    return texts


@pytest.fixture(scope="module")
def theirs() -> Callable[[list[str]], torch.Tensor]:
    tokenizer: Callable[[list[str]], torch.Tensor] = open_clip.tokenizer.SimpleTokenizer(context_length=LENGTH)
    return tokenizer


def test_ids_equal_open_clips(theirs: Callable[[list[str]], torch.Tensor]) -> None:
    texts = captions(10_000)
    ours, expected = Tokenizer(LENGTH)(texts), theirs(texts)
    assert ours.shape == (10_000, LENGTH)
    assert ours.dtype == torch.int32
    wrong = (ours != expected).any(dim=1).nonzero().flatten().tolist()
    assert not wrong, f"{len(wrong)} captions differ, the first is {texts[wrong[0]]!r}"
    lengths = (expected != 0).sum(dim=1)
    assert (lengths == LENGTH).sum() > 500, "too few over-long captions to mean anything"
    assert (lengths < LENGTH).sum() > 500


def test_letters_from_all_of_unicode_are_cut_as_open_clip_cuts_them(
    theirs: Callable[[list[str]], torch.Tensor],
) -> None:
    # 24 characters at a time, each between letters, so that the class of each decides where words end.
    codes = [code for code in range(0x30000) if not 0xD800 <= code < 0xE000][::7]
    texts = ["".join(f"a{chr(code)}b" for code in codes[start : start + 24]) for start in range(0, len(codes), 24)]
    assert torch.equal(Tokenizer(LENGTH)(texts).long(), theirs(texts))


@pytest.mark.parametrize("length", [3, 16, 200])
def test_other_context_lengths(length: int) -> None:
    texts = captions(200)
    expected = open_clip.tokenizer.SimpleTokenizer(context_length=length)(texts)
    assert torch.equal(Tokenizer(length)(texts).long(), expected)


def test_the_short_way_through_cleaning_changes_nothing() -> None:
    draw = random.Random(1)
    printable = [chr(code) for code in range(32, 127)]
    for _ in range(2000):
        text = "".join(draw.choices(printable, k=draw.randrange(40)))
        assert clean(text) == open_clip.tokenizer.get_clean_fn("lower")(text), repr(text)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.one_of(st.text(st.characters(max_codepoint=127)), st.sampled_from(["<start_of_text>", "'s", "'LL", "&amp;"]))
    ).map("".join)
)
def test_the_short_way_through_cutting_changes_nothing(text: str) -> None:
    """ASCII in, control characters and entities too, cuts as the pattern for all of Unicode does."""
    cleaned = clean(text)
    assert words(cleaned) == WORD.findall(cleaned)


def test_a_thousand_line_breaks_are_mended_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    mended: list[str] = []
    fix = ftfy.fix_text

    def note(text: str) -> str:
        mended.append(text)
        return fix(text)

    monkeypatch.setattr(ftfy, "fix_text", note)
    for blank in ("\n", "\r\n", " \n", "\t\n"):
        assert clean("a dog." + blank * 1000 + "A\tcat") == "a dog. a cat"
        assert mended == []  # plain text needs no mending
        assert clean("caf\u00e9\n" + blank * 1000 + "a cat") == "caf\u00e9 a cat"
        assert mended.pop() == "caf\u00e9\na cat"


def test_words_behind_the_last_id_are_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caption with a picture in base64 has a million words: merging them all took a second a view."""
    whole = Tokenizer(77)
    text = "a1b2" * 1000
    wanted = whole([text])
    merged = []
    merge = whole._merge

    class Counting:
        def encode(self, word: str) -> object:
            merged.append(word)
            return merge.encode(word)

    short = Tokenizer(77)
    monkeypatch.setattr(short, "_merge", Counting())
    monkeypatch.setattr("cosmos_scale.model.tokenizer.REMEMBERED_LENGTH", 0)
    assert torch.equal(short([text]), wanted)
    assert len(merged) == 75


def test_memory_of_words_is_bounded_and_forgetting_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = captions(300)
    expected = Tokenizer(LENGTH)(texts)
    monkeypatch.setattr("cosmos_scale.model.tokenizer.REMEMBERED_WORDS", 50)
    tokenizer = Tokenizer(LENGTH)
    assert torch.equal(tokenizer(texts), expected)
    assert len(tokenizer._ids) <= 50


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_it_works_in_a_worker_after_use_in_the_parent(method: str) -> None:
    texts = captions(100)
    tokenizer = Tokenizer(LENGTH)
    expected = tokenizer(texts).numpy()
    with multiprocessing.get_context(method).Pool(1) as pool:
        in_child = pool.apply_async(ids_as_array, (tokenizer, texts)).get(timeout=120)
    np.testing.assert_array_equal(in_child, expected)


def test_a_pickle_holds_no_vocabulary() -> None:
    tokenizer = Tokenizer(LENGTH)
    pickled = pickle.dumps(tokenizer)
    assert len(pickled) < 200
    texts = captions(20)
    assert torch.equal(pickle.loads(pickled)(texts), tokenizer(texts))


def test_open_clip_is_read_but_not_imported() -> None:
    program = "import sys; from cosmos_scale.model.tokenizer import Tokenizer; Tokenizer(77); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    modules = result.stdout.split()
    assert "tokenizers" in modules
    assert not {"open_clip", "transformers"} & set(modules)


def test_a_missing_vocabulary_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosmos_scale.model.tokenizer.VOCABULARY_FILE", "absent.txt.gz")
    with pytest.raises(UserError, match=r"absent\.txt\.gz: missing, though the installed open-clip-torch"):
        _word_merger.__wrapped__()
    monkeypatch.setattr("cosmos_scale.model.tokenizer.VOCABULARY_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install open-clip-torch"):
        _word_merger.__wrapped__()


def test_it_is_faster_than_open_clips(theirs: Callable[[list[str]], torch.Tensor]) -> None:
    # 3 to 5 times on plain captions of which both have seen the words; processor time, since others may be running.
    draw = random.Random(2)
    words = ["a", "the", "small", "red", "dog", "sits", "on", "under", "chair", "grass", "window", "photo", "of", "sky"]
    texts = [" ".join(draw.choices(words, k=20)).capitalize() + "." for _ in range(1000)]

    def seconds(tokenize: Callable[[list[str]], torch.Tensor]) -> float:
        tokenize(texts)
        times = []
        for _ in range(3):
            start = time.process_time()
            tokenize(texts)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(Tokenizer(LENGTH)) * 1.5 < seconds(theirs)
