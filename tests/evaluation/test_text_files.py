"""Users' files of class names, templates and pairs: where a line ends, what no line is, which columns are read."""

import json
from pathlib import Path

import pytest

from cosmos_scale.config import RetrievalConfig
from cosmos_scale.data.tools.captions_file import read_rows
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets.captioned_files import open_pairs
from cosmos_scale.evaluation.prompts.texts import read_names, read_templates
from cosmos_scale.files import text_lines
from tests.evaluation.labelled import said_of_captions, save_picture

IN_A_NAME = "\u2028\u2029\x85\f\v\x1c"


def test_lines_end_at_line_breaks_alone(tmp_path: Path) -> None:
    assert text_lines(f"a{IN_A_NAME}b\nc\r\nd\re\n\nf\n") == [f"a{IN_A_NAME}b", "c", "d", "e", "", "f"]
    assert text_lines("") == []
    assert text_lines("a") == ["a"]
    file = tmp_path / "names.txt"
    file.write_bytes("\n".join(f"cat{mark}fish" for mark in IN_A_NAME).encode())
    assert read_names(file) == tuple((f"cat{mark}fish",) for mark in IN_A_NAME)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cat\nd\0og\n", "line 2 holds a NUL: 'd\\x00og'; rule: a text file in UTF-8, a class a line"),
        ("cat\ndog\n".encode("utf-16-le").decode(), "is UTF-16 or no text; save it as UTF-8"),
        ("'cat',\n'dog',\n", "line 1 is code of Python: 'cat',; rule: a class a line, here: cat"),
        ('["cat", "dog"]\n', 'line 1 is a list, as in JSON: ["cat", "dog"]; rule: a class a line, without quotes'),
        ("cat\ndog, \n", "line 2 is 'dog, ', with an empty name beside a comma; rule: names of a class are"),
        ("- cat\n- dog\n", "line 1 is '- cat', and each line has a bullet beside the name, which would become"),
        ('cat\n"dog",\n', 'line 2 is code of Python: "dog",; rule: a class a line, here: dog'),
    ],
)
def test_names_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes(text.encode())
    with pytest.raises(UserError) as caught:
        read_names(file)
    assert str(caught.value).startswith(f"{file}: {said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "lambda c: f'a photo of a {c}.',",
        "    lambda c: f'a photo of a {c}.'",
        'lambda name: f"a photo of a {c}.",',
        "f'a photo of a {c}.',",
        "'a photo of a {c}.',",
    ],
)
def test_a_template_of_openclips_file_is_told_as_code(tmp_path: Path, line: str) -> None:
    file = tmp_path / "templates.txt"
    file.write_text(f"{line}\n")
    with pytest.raises(
        UserError, match=r"line 1 is code of Python: .*; rule: a template a line, here: a photo of a {c}\.$"
    ):
        read_templates(file)


def test_quotes_that_belong_to_a_text_stay(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("a photo of 'the' {}.\n\"{}\"\n'{c}'\n")
    assert read_templates(file) == ("a photo of 'the' {}.", '"{}"', "'{}'")
    file.write_text("Persian'\n'em up, cats\ncat, 'kitty'\n")
    assert read_names(file) == (("Persian'",), ("'em up", "cats"), ("cat", "'kitty'"))


def test_pairs_may_have_columns_of_one_name_that_are_not_read(tmp_path: Path) -> None:
    """Spreadsheets write empty columns behind the last one, and pandas an index without a name before the first."""
    (tmp_path / "a.jpg").touch()
    path = tmp_path / "pairs.csv"
    path.write_text("\ufeff,image,caption,note,Note,,\r\n0,a.jpg,one,x,y,,\r\n")
    assert [texts for _, texts in open_pairs(path, None)] == [["one"]]
    path.write_text("image,caption,Caption,words\na.jpg,one,two,three\n")
    assert [texts for _, texts in open_pairs(path, "words")] == [["three"]]
    path.write_text("image,words,Words\na.jpg,one,two\n")
    with pytest.raises(UserError, match=r"two columns are called words \(words, Words\)"):
        open_pairs(path, "words")
    path.write_text("image,Image,caption\na.jpg,b.jpg,one\n")
    with pytest.raises(UserError, match=r"two columns are called image \(image, Image\)"):
        open_pairs(path, None)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_pairs_name_their_pictures_as_captions_files_of_a_build_do(tmp_path: Path, ending: str) -> None:
    """Of several columns that may name the picture both take the same one, wherever it stands."""
    for name in ("0.jpg", "1.jpg", "2.jpg"):
        (tmp_path / name).touch()
    path = tmp_path / f"pairs.{ending}"
    if ending == "csv":
        path.write_text("key,file,image,caption\n0.jpg,1.jpg,2.jpg,one\n0.jpg,1.jpg,,two\n0.jpg,,,three\n,,,\n")
    else:
        path.write_text(
            '{"key": "0.jpg", "file": "1.jpg", "image": "2.jpg", "caption": "one"}\n'
            '{"key": "0.jpg", "file": "1.jpg", "image": null, "caption": "two"}\n{"key": "0.jpg", "caption": "three"}\n'
        )
    pairs = {Path(file.path).name: texts for file, texts in open_pairs(path, None)}
    assert pairs == {"2.jpg": ["one"], "1.jpg": ["two"], "0.jpg": ["three"]}
    assert [row.image for row in read_rows(path)][:3] == ["2.jpg", "1.jpg", "0.jpg"]


def test_links_to_one_file_are_one_picture(tmp_path: Path) -> None:
    """By its first name, with the captions in the order of the rows; names that no file can have are pictures too."""
    (tmp_path / "0.jpg").write_bytes(b"a picture")
    (tmp_path / "1.jpg").write_bytes(b"a picture")
    (tmp_path / "link.jpg").symlink_to("0.jpg")
    (tmp_path / "folder").symlink_to(".")
    named = ["link.jpg", "1.jpg", "0.jpg", "folder/0.jpg", "folder/1.jpg", "a\0b.jpg", "\ud800.jpg"]
    rows = [json.dumps({"image": image, "caption": f"text {place}"}) for place, image in enumerate(named)]
    (tmp_path / "list").mkdir()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "list" / "rows.jsonl").symlink_to("../rows.jsonl")  # the pictures lie beside the file that it leads to
    for file in ("rows.jsonl", "list/rows.jsonl"):
        found = [(picture.name, texts) for picture, texts in open_pairs(tmp_path / file, None)]
        assert found[:2] == [("link.jpg", ["text 0", "text 2", "text 3"]), ("1.jpg", ["text 1", "text 4"])]
        assert [texts for _, texts in found[2:]] == [["text 5"], ["text 6"]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pairs.csv", "image,caption,Caption 2,caption_id\na.jpg,one,two,7\nb.jpg,three,,8\n"),
        ("pairs.jsonl", '{"image": "a.jpg", "caption": "one", "Caption 2": ["two"], "caption_id": 7}'),
    ],
)
def test_further_captions_of_pairs_are_told(
    name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A column for each caption, as tables have them: one alone is read, and fewer right answers are worse numbers."""
    for number, picture in enumerate(("a.jpg", "b.jpg")):
        save_picture(tmp_path / picture, number)
    (tmp_path / name).write_text(text)
    section = RetrievalConfig(kind="retrieval", dataset="pairs", data=str(tmp_path / name))
    assert said_of_captions(section, capsys) == (
        f"{tmp_path}/{name}: 1 row has text under Caption 2, which is not read; rule: all captions of a picture are a "
        "list under one key, or lie in rows of their own; --captions KEY names another key\n"
    )
