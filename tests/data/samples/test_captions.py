"""Caption draws: the law over all outcomes, every sampling mode, and wrongly shaped documents."""

import itertools
import math
from collections import Counter
from fractions import Fraction
from typing import Any, get_args

import pytest
from scipy import stats

from cosmos_scale.config import CaptionSampling, CaptionsConfig
from cosmos_scale.data.samples.caption_keys import caption_fault, caption_keys
from cosmos_scale.data.samples.captions import caption_pool, draw_captions
from cosmos_scale.data.samples.sample import DamagedSample, SampleKey

# A right law gives a p-value below this limit for one of a thousand seeds; the seeds here are fixed.
P_VALUE = 1e-3

DREAMLIP: dict[str, Any] = {
    "raw_caption": ["raw 1"],
    "shortIB_captions": ["short ib 1"],
    "shortSV_captions": ["short sv 1", "short sv 2"],
    "shortLLA_captions": ["short lla 1"],
    "longIB_captions": ["long ib 1", "long ib 2", "long ib 3"],
    "longSV_captions": ["long sv 1", "long sv 2"],
    "longLLA_captions": ["long lla 1", "long lla 2"],
}
RAW = DREAMLIP["raw_caption"]
SHORT = ["short ib 1", "short sv 1", "short sv 2", "short lla 1"]
LONG = [f"long {name}" for name in ("ib 1", "ib 2", "ib 3", "sv 1", "sv 2", "lla 1", "lla 2")]
PIXELPROSE: dict[str, Any] = {
    "original_caption": "St. Paul's in the U.S. at 3.5 pm",
    "caption": "This is a cat. It weighs 3.5 kg\nand sleeps</s> . \n\n Soft fur",
}
GENERATED = ["This is a cat", "It weighs 3", "5 kg", "and sleeps", "Soft fur"]
ORIGINAL = [PIXELPROSE["original_caption"]]


def config(sampling: CaptionSampling, count: int = 8, global_count: int = 2, max_sentences: int = 5) -> CaptionsConfig:
    return CaptionsConfig(sampling=sampling, count=count, global_count=global_count, max_sentences=max_sentences)


def draws(captions: CaptionsConfig, document: dict[str, Any], number: int) -> list[tuple[str, ...]]:
    return [tuple(draw_captions(captions, document, SampleKey(0, 0, sample))) for sample in range(number)]


def assert_law(outcomes: list[Any], law: dict[Any, Fraction]) -> None:
    """Compare counts of every outcome with its exact probability."""
    assert sum(law.values()) == 1
    counts = Counter(outcomes)
    assert set(counts) <= set(law)
    expected = [float(probability) * len(outcomes) for probability in law.values()]
    assert min(expected) >= 5, "chi-square wants at least five expected counts a cell"
    if len(law) == 1:
        return  # the assertion above says everything
    assert stats.chisquare([counts[outcome] for outcome in law], expected).pvalue > P_VALUE


def choice_law(pool: list[str], count: int) -> dict[tuple[str, ...], Fraction]:
    """Every way to take `count` of a pool, with its probability, directly from the published rule."""
    n = len(pool)
    head, rest = ((), count) if n >= count else (tuple(pool) * (count // n), count % n)
    tails = list(itertools.permutations(pool, rest))
    return {head + tail: Fraction(1, len(tails)) for tail in tails}


@pytest.mark.parametrize(
    ("n", "k"), [(5, 1), (5, 2), (4, 3), (4, 4), (1, 1), (1, 4), (2, 3), (3, 6), (3, 8)], ids=lambda value: str(value)
)
def test_drawing_k_from_n(n: int, k: int) -> None:
    pool = [f"sentence {i}" for i in range(n)]
    assert_law(draws(config("random", count=k, global_count=1), {"raw_caption": pool}, 2000), choice_law(pool, k))


@pytest.mark.parametrize("sampling", ["textcrop", "textcrop_pixelprose"])
def test_textcrop_over_all_outcomes(sampling: CaptionSampling) -> None:
    """Globals of one or two sentences, two locals of three: 486 joint outcomes, so independence is tested too."""
    pool = ["a", "b", "c"]
    document = {"raw_caption": ["a"], "longSV_captions": ["b", "c"], "original_caption": "a", "caption": "b. c."}
    global_law: dict[str, Fraction] = {}
    for sentences in (1, 2):
        for chosen, probability in choice_law(pool, sentences).items():
            global_law[". ".join(chosen)] = probability / 2
    law = {
        (first, second, *rest): global_law[first] * global_law[second] * probability
        for first, second in itertools.product(global_law, repeat=2)
        for rest, probability in choice_law(pool, 2).items()
    }
    assert len(law) == 486
    assert_law(draws(config(sampling, count=4, max_sentences=2), document, 6000), law)


def test_global_sentence_counts_are_uniform_and_independent() -> None:
    outcomes = [
        tuple(caption.count(". ") + 1 for caption in captions[:2])
        for captions in draws(config("textcrop"), DREAMLIP, 2500)
    ]
    assert_law(outcomes, {pair: Fraction(1, 25) for pair in itertools.product(range(1, 6), repeat=2)})


def test_a_global_caption_may_need_more_sentences_than_there_are() -> None:
    longest = max((captions[0] for captions in draws(config("textcrop"), {"raw_caption": ["x", "y"]}, 50)), key=len)
    assert longest.split(". ")[:4] == ["x", "y", "x", "y"]
    assert len(longest.split(". ")) == 5


@pytest.mark.parametrize(
    ("sampling", "document", "pool"),
    [
        ("raw", DREAMLIP, RAW),
        ("random", DREAMLIP, RAW + SHORT + LONG),
        ("short", DREAMLIP, RAW + SHORT),
        ("long", DREAMLIP, LONG),
        ("raw_pixelprose", PIXELPROSE, ORIGINAL),
        ("random_pixelprose", PIXELPROSE, ORIGINAL + GENERATED),
        ("textcrop", DREAMLIP, RAW + SHORT + LONG),
        ("textcrop_pixelprose", PIXELPROSE, ORIGINAL + GENERATED),
    ],
)
def test_each_mode_draws_single_sentences_from_its_pool(
    sampling: CaptionSampling, document: dict[str, Any], pool: list[str]
) -> None:
    locals_only = 2 if sampling.startswith("textcrop") else 0
    count, global_count = (1, 1) if sampling == "raw" else (6, 2)
    seen: Counter[str] = Counter()
    for captions in draws(config(sampling, count, global_count), document, 800):
        assert len(captions) == count
        seen.update(captions[locals_only:])
    assert_law(list(seen.elements()), {sentence: Fraction(1, len(pool)) for sentence in pool})


def test_whole_pools_keep_the_order_of_the_keys() -> None:
    pool = RAW + SHORT + LONG
    (captions,) = draws(config("random", count=2 * len(pool)), dict(reversed(DREAMLIP.items())), 1)
    assert captions == tuple(pool) * 2


def test_every_mode_is_covered_and_deterministic() -> None:
    both = DREAMLIP | PIXELPROSE
    for sampling in get_args(CaptionSampling):
        captions = config(sampling, *(1, 1) if sampling == "raw" else (8, 2))
        first = draw_captions(captions, both, SampleKey(1, 2, 3))
        assert first == draw_captions(captions, both, SampleKey(1, 2, 3))
        assert len(first) == captions.count
    changed = [SampleKey(0, 2, 3), SampleKey(1, 0, 3), SampleKey(1, 2, 0)]
    original = draw_captions(config("textcrop"), both, SampleKey(1, 2, 3))
    assert all(draw_captions(config("textcrop"), both, key) != original for key in changed)


def test_sentences_in_lists_are_taken_as_they_are() -> None:
    sentence = "  Two sentences. In one string.  "
    assert draw_captions(config("raw", count=1, global_count=1), {"raw_caption": [sentence]}, SampleKey(0, 0, 0)) == [
        sentence
    ]


def test_a_plain_string_is_split_into_sentences() -> None:
    document = {"raw_caption": "A cat sleeps. It is 3.5 years old.", "longIB_captions": None}
    seen = {caption for captions in draws(config("random", count=2), document, 20) for caption in captions}
    assert seen == {"A cat sleeps", "It is 3.5 years old"}


@pytest.mark.parametrize("sampling", ["textcrop", "random", "raw", "short"])
def test_a_plain_caption_stands_for_the_raw_one(sampling: CaptionSampling) -> None:
    captions = config(sampling, *(1, 1) if sampling == "raw" else (8, 2))
    for value in ("A cat sleeps. It is old.", ["one cat", "two cats"]):
        plain = draws(captions, {"caption": value, "url": "https://example.org", "width": 3}, 20)
        assert plain == draws(captions, {"raw_caption": value}, 20)
    both = draws(captions, {"caption": "of the web page", "raw_caption": ["a cat"]}, 20)
    assert both == draws(captions, {"raw_caption": ["a cat"]}, 20)


def test_a_generated_caption_that_is_a_list_was_split_before() -> None:
    """As the preparation of PixelProse writes them; a string is split at every full stop, as published."""
    document = {"original_caption": "a. b", "caption": ["It weighs 3.5 kg", "It sleeps"]}
    seen = {caption for captions in draws(config("random_pixelprose", count=2), document, 40) for caption in captions}
    assert seen == {"a. b", "It weighs 3.5 kg", "It sleeps"}


@pytest.mark.parametrize(
    ("sampling", "document"),
    [
        ("textcrop", {"raw_caption": math.nan, "shortIB_captions": ["a"]}),
        ("textcrop", {"raw_caption": math.nan, "caption": "a"}),
        ("raw_pixelprose", {"original_caption": "a", "caption": math.nan}),
        ("textcrop_pixelprose", {"original_caption": math.nan, "caption": "a"}),
    ],
)
def test_nan_is_null(sampling: CaptionSampling, document: dict[str, Any]) -> None:
    """NaN is what pandas writes for an empty cell, and Python's json reads and writes it."""
    null = {name: None if value is math.nan else value for name, value in document.items()}
    assert caption_pool(sampling, document) == caption_pool(sampling, null) == ["a"]
    with pytest.raises(DamagedSample, match="needs one of raw_caption"):
        caption_pool("textcrop", {"raw_caption": math.nan, "caption": math.nan})


@pytest.mark.parametrize(
    ("sampling", "document", "reason"),
    [
        ("textcrop", ["a list"], "caption document is a list"),
        ("textcrop", "a string", "caption document is a string"),
        ("textcrop", None, "caption document is null"),
        ("textcrop", {}, "the document has no keys"),
        ("textcrop", {"body": "text"}, "needs one of raw_caption, .*, or else caption, .*; the document has body"),
        ("textcrop", PIXELPROSE, "needs one of raw_caption, .*; the document has original_caption, caption"),
        ("long", {"caption": "text"}, "sampling long needs one of longIB_captions"),
        ("textcrop", {"caption": 7}, "caption is a number"),
        ("long", {"raw_caption": ["text"]}, "sampling long needs one of longIB_captions"),
        ("textcrop", {"raw_caption": 7}, "raw_caption is a number, expected a list of sentences or a string"),
        ("textcrop", {"raw_caption": {"a": "b"}}, "raw_caption is an object"),
        ("textcrop", {"raw_caption": ["a"], "longIB_captions": ["b", None]}, r"longIB_captions\[1\] is null"),
        ("textcrop", {"raw_caption": [["a"]]}, r"raw_caption\[0\] is a list, expected a string"),
        ("textcrop", {"raw_caption": []}, "no caption text for sampling textcrop"),
        ("textcrop", {"raw_caption": ["", "  "]}, "no caption text"),
        ("textcrop", {"raw_caption": " . "}, "no caption text"),
        ("textcrop_pixelprose", DREAMLIP, "needs one of original_caption, caption"),
        ("textcrop_pixelprose", {"original_caption": ["a"], "caption": "b"}, "caption is a list, expected a string"),
        ("textcrop_pixelprose", {"original_caption": "a", "caption": ["b", 7]}, r"caption\[1\] is a number"),
        ("raw_pixelprose", {"original_caption": True}, "original_caption is a boolean, expected a string"),
        ("raw_pixelprose", {"caption": "text"}, "needs one of original_caption"),
        ("random_pixelprose", {"original_caption": "", "caption": ". \n"}, "no caption text"),
    ],
)
def test_wrongly_shaped_documents_are_damaged(sampling: CaptionSampling, document: Any, reason: str) -> None:
    with pytest.raises(DamagedSample, match=reason):
        draw_captions(config(sampling), document, SampleKey(0, 0, 0))


@pytest.mark.parametrize("name", ["caption", "Caption", "captions", "text", "TEXT", "title", "Raw Caption"])
@pytest.mark.parametrize("sampling", ["textcrop", "random", "raw", "short"])
def test_captions_under_other_names_are_raw_captions(sampling: CaptionSampling, name: str) -> None:
    document = {"url": "https://example.org/1.jpg", "raw_caption": None, name: "A cat. It sleeps."}
    assert caption_pool(sampling, document) == ["A cat", "It sleeps"]
    assert caption_pool(sampling, {name: ["a cat", "it sleeps"]}) == ["a cat", "it sleeps"]


def test_known_keys_come_before_other_names() -> None:
    assert caption_pool("textcrop", DREAMLIP | {"text": "other", "Caption": "other"}) == [*RAW, *SHORT, *LONG]
    assert caption_pool("textcrop", {"title": "c", "text": "b", "captions": ["a"]}) == ["a"]
    assert caption_pool("textcrop", {"title": "b", "LongSV_captions": ["a"], "text": ""}) == ["a"]
    assert caption_pool("textcrop_pixelprose", {"text": "A cat. It sleeps."}) == ["A cat", "It sleeps"]
    assert caption_pool("textcrop", {"raw_caption": [""], "original_caption": None, "caption": "a cat"}) == ["a cat"]


def test_keys_of_the_run_are_the_pool() -> None:
    document = {"caption": "left alone", "blip": "A cat. It sleeps.", "human": ["a pet"], "none": None}
    assert caption_pool("textcrop", document, ["human", "none", "blip"]) == ["a pet", "A cat", "It sleeps"]
    one = CaptionsConfig(sampling="random", count=2, global_count=1, keys=("human",))
    assert draw_captions(one, document, SampleKey(0, 0, 0)) == ["a pet", "a pet"]
    with pytest.raises(DamagedSample, match=r"data\.captions\.keys needs one of none; the document has caption, blip"):
        caption_pool("textcrop", document, ["none"])
    with pytest.raises(ValueError, match=r"keys: .* goes with sampling textcrop or random, not long"):
        CaptionsConfig(sampling="long", keys=("human",))


def test_caption_keys_are_named_as_they_stand() -> None:
    document = {"url": "x", "Caption": "a", "raw_caption": [""], "text": None, "title": ["b"], "captions": float("nan")}
    assert caption_keys(document) == ["Caption", "title"]


@pytest.mark.parametrize(
    ("document", "clash"),
    [
        ({"Caption": "a", "CAPTION": "b"}, "Caption, CAPTION"),
        ({"vlm_caption": "a", "Caption": "b"}, "vlm_caption, Caption"),
        ({"Text": "a", "text": "b"}, "Text, text"),
        ({"Caption": "a", "CAPTION": " "}, None),
        ({"caption": "a", "CAPTION": "b"}, None),  # the key as it is known comes first
        ({"captions": "a", "text": "b"}, None),  # so does the first of other names
    ],
)
def test_two_keys_of_one_name_are_refused(document: dict[str, Any], clash: str | None) -> None:
    if clash is None:
        assert caption_pool("textcrop", document) == ["a"]
        assert caption_fault(document) is None
    else:
        with pytest.raises(DamagedSample, match=f"^two keys of one name: {clash}$"):
            caption_pool("textcrop", document)
        assert caption_fault(document) == f"two keys of one name: {clash}"


@pytest.mark.parametrize(
    "text", ["....", " . \n.", "\u3002", "</s>.", "...a", "!!!", "\u2026", "a.", "1.", "\U0001f600."]
)
@pytest.mark.parametrize("name", ["caption", "raw_caption", "Text", "title"])
def test_a_caption_without_a_sentence_is_a_fault_where_the_sampling_finds_none(name: str, text: str) -> None:
    usable = any(sentence.strip() for sentence in caption_pool("textcrop", {name: text}))
    assert (caption_fault({name: text}) is None) is usable
    assert caption_fault({name: [text]}) is None  # a list's sentences are taken as they are
