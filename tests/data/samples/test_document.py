"""Json of samples: what cannot be kept as it is, is refused."""

import json
import re

import pytest

from cosmos_scale.data.samples.document import encode_document, parse_json
from cosmos_scale.data.samples.sample import DamagedSample


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_sound_json_is_read_as_pythons_reader_does(encoding: str) -> None:
    document = {"caption": "caf\u00e9 \U0001f600", "longIB_captions": ["a", "b"], "deep": {"caption": 1.5}}
    for ascii_only in (True, False):  # escaped, an emoji is a pair of surrogates
        data = json.dumps(document, ensure_ascii=ascii_only).encode(encoding)
        assert parse_json(data) == json.loads(data) == document


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice in one object"),
        (b'{"x": [{"caption": "b", "caption": "b"}]}', "the key 'caption' stands twice"),
    ],
)
def test_what_would_be_lost_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_json(data)


@pytest.mark.parametrize("text", ["\0", "a\0b", "\\\0", "a\\\\\0"])
def test_a_document_with_nul_is_not_written(text: str) -> None:
    for document in ({"caption": text}, {"longIB_captions": ["a", text]}, {text: "a"}, [text]):
        with pytest.raises(DamagedSample, match=r"^not text: NUL"):
            encode_document(document)


@pytest.mark.parametrize("text", [r"\u0000", r"\\u0000", "\\", "u0000"])
def test_letters_that_spell_nul_are_text(text: str) -> None:
    assert json.loads(encode_document({"caption": text})) == {"caption": text}


def test_a_document_with_half_of_a_pair_is_not_written() -> None:
    assert encode_document({"caption": "caf\u00e9"}) == '{"caption": "caf\u00e9"}'.encode()
    whole = parse_json(rb'{"caption": "\ud83d\ude00"}')  # both halves, in two escapes
    assert encode_document(whole) == '{"caption": "\U0001f600"}'.encode()
    for document in ({"caption": "a cat \ud83d"}, {"longIB_captions": ["\ud83d", "\ude00"]}):
        with pytest.raises(DamagedSample, match=r"^not text: half of a surrogate pair, \\ud83d, stands alone behind"):
            encode_document(document)
