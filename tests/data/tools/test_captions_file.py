"""What a captions file says twice, or what no text is, is not dropped or changed without a word."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.data.tools import captions_file
from cosmos_scale.data.tools.captions_file import DEFAULT_COLUMNS, read_rows
from cosmos_scale.errors import UserError


def test_a_key_that_stands_twice_is_a_fault_of_its_row(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text('{"image": "a.jpg", "caption": "one", "caption": "two"}\n{"image": "b.jpg", "caption": "three"}\n')
    first, second = read_rows(path, DEFAULT_COLUMNS)
    assert first.fault == "not json: the key 'caption' stands twice in one object"
    assert second.fault is None


def test_nul_in_a_cell_is_a_fault_of_its_row(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_bytes(b"image,caption\na.jpg,one\nb.jpg,\0\0\0\nc.jpg,three\n")
    faults = [row.fault for row in read_rows(path, DEFAULT_COLUMNS)]
    assert faults[0] is None
    assert faults[2] is None
    assert "NUL" in str(faults[1])


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("['One.' 'Two.']", ["One.", "Two."]),  # an array of numpy, as pandas writes it
        ("['One.'\n \"It's two.\"]", ["One.", "It's two."]),
        ("['One.', 'Two.']", ["One.", "Two."]),
        ("[2019]", "[2019]"),
        ("[photo] a dog [sic]", "[photo] a dog [sic]"),
        ('["One.", null]', None),
        ("['One.', nan]", "['One.', nan]"),
    ],
)
def test_a_cell_that_spells_a_list_keeps_its_sentences_apart(tmp_path: Path, cell: str, expected: Any) -> None:
    path = tmp_path / "captions.csv"
    path.write_text("image,caption\na.jpg," + '"' + cell.replace('"', '""') + '"\n')
    (row,) = read_rows(path, DEFAULT_COLUMNS)
    if expected is None:
        assert row.fault == "wrong type: caption is neither a string nor a list of strings"
    else:
        assert (row.fault, row.document) == (None, {"caption": expected})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('["One.", "Two."]', ["One.", "Two."]),
        ("['One.' 'Two.']", ["One.", "Two."]),
        ("[2019]", "[2019]"),
        ("nan", None),
        ("NaN", None),
        ("None", None),
        ("<NA>", None),
        ("\\N", None),
        ("NA", None),
        ("N/A", None),
        ("#N/A", None),
        ("null", None),
        ("Nan bread", "Nan bread"),
        ("NA beer", "NA beer"),
        ("none", "none"),
    ],
)
@pytest.mark.parametrize("column", ["caption", "original_caption"])
def test_a_text_says_the_same_in_json_lines_as_in_csv(tmp_path: Path, column: str, text: str, expected: Any) -> None:
    if column == "original_caption" and expected is not None:
        expected = text  # an alternative text of the web is never a list
    lines, table = tmp_path / "captions.jsonl", tmp_path / "captions.csv"
    lines.write_text(json.dumps({"image": "a.jpg", column.upper(): text}) + "\n")
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["image", column.upper()], ["a.jpg", text]])
    for path in (lines, table):
        (row,) = read_rows(path, DEFAULT_COLUMNS)
        assert row.document == ({} if expected is None else {column: expected})
        assert row.fault == (None if expected is not None else f"no caption: empty is {column}")


def test_json_lines_that_end_in_cr_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    rows = [json.dumps({"image": f"{number}.jpg", "caption": "a"}) for number in range(3)]
    path.write_bytes("\r\n".join(rows).encode())
    assert [row.fault for row in read_rows(path, DEFAULT_COLUMNS)] == [None] * 3
    path.write_bytes("\r".join(rows).encode())
    with pytest.raises(UserError, match=r"captions.jsonl: its lines end in CR; rule: lines end in LF, or CR and LF"):
        list(read_rows(path, DEFAULT_COLUMNS))


def test_empty_lines_before_the_header_are_stepped_over(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_bytes(b"\r\n\nimage,caption\na.jpg,one\n")
    assert [(row.number, row.document) for row in read_rows(path, DEFAULT_COLUMNS)] == [(1, {"caption": "one"})]


@pytest.mark.parametrize("text", ["x" * 11, ["x" * 6, "x" * 5]])
def test_a_text_without_bounds_is_a_fault_of_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Any
) -> None:
    """Cells of a CSV are bounded alike: such a text would hold up its loader process for minutes, in every epoch."""
    monkeypatch.setattr(captions_file, "CELL_LIMIT", 10)
    captions = tmp_path / "captions.jsonl"
    rows = [{"image": "0.jpg", "caption": caption} for caption in (text, "x" * 10)]
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    faults = [row.fault for row in read_rows(captions)]
    assert faults == ["too long: caption has 11 letters, more than 10", None]


@pytest.mark.parametrize("indent", [None, 1])
def test_one_json_array_is_refused_with_the_way_out(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "captions.jsonl"
    rows = [{"image": f"{number}.jpg", "caption": "a"} for number in range(3)]
    for text in (json.dumps(rows, indent=indent), "[" + ",\n".join(map(json.dumps, rows)) + "]"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"is one json array; rule: .jsonl holds one object a line"):
            list(read_rows(path, DEFAULT_COLUMNS))


def test_objects_that_span_lines_are_refused_with_the_way_out(tmp_path: Path) -> None:
    """As `jq .` without -c and json.dump with an indent write them: else each line is a reject of its own."""
    path = tmp_path / "captions.jsonl"
    row = {"image": "0.jpg", "caption": "a"}
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(f"{json.dumps(row, indent=2)}\n" * 2, encoding=encoding)
        with pytest.raises(UserError, match=r"its objects span lines; rule: .jsonl holds one a line, as `jq -c"):
            list(read_rows(path))
    path.write_text(f'{{"image": \n{json.dumps(row)}\n')  # a line that was cut is a reject
    assert [row.fault is None for row in read_rows(path)] == [False, True]


@pytest.mark.parametrize(("text", "sound"), [("....", False), ("\u3002", False), ("...a", True), ([".."], True)])
def test_a_caption_without_a_sentence_is_a_fault_of_its_row(tmp_path: Path, text: Any, sound: bool) -> None:
    """Indexing alone would reject the sample, which its row's number is lost to."""
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"image": "a.jpg", "caption": text}))
    (row,) = read_rows(path, DEFAULT_COLUMNS)
    assert row.fault == (None if sound else "no caption: no sentence in caption")


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_another_separator_than_commas_is_named(tmp_path: Path, separator: str, name: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"image{separator}caption\na.jpg{separator}a, b\n")
    with pytest.raises(UserError, match=f"columns are separated by {name}.*; rule: commas separate the columns"):
        list(read_rows(path))


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;", "\ufeffsep=;"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_first_line_for_excel_names_the_separator(tmp_path: Path, first: str, end: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(end.join([first, "image;caption", "a.jpg;a, b", '"b.jpg"; "c; d"', "c.jpg;e;f", ""]).encode())
    rows = list(read_rows(path))
    assert [(row.number, row.image, row.document) for row in rows[:2]] == [
        (1, "a.jpg", {"caption": "a, b"}),
        (2, "b.jpg", {"caption": "c; d"}),
    ]
    assert rows[2].fault == "wrong number of cells: 3, the header has 2"


@pytest.mark.parametrize("separator", [",", "\t", "|"])
def test_a_first_line_may_name_any_separator(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"sep={separator}\nimage{separator}caption\na.jpg{separator}a b\n")
    assert [row.document for row in read_rows(path)] == [{"caption": "a b"}]


def test_columns_without_a_name_are_no_columns_of_one_name(tmp_path: Path) -> None:
    """Spreadsheets write empty columns behind the last one, and pandas an index without a name before the first."""
    path = tmp_path / "captions.csv"
    path.write_text("\ufeff,image,caption,,\r\n0,a.jpg,one,,\r\n1,b.jpg,two,,a note\r\n")
    assert [row.document for row in read_rows(path, DEFAULT_COLUMNS)] == [{"caption": "one"}, {"caption": "two"}]


def test_a_row_whose_text_stands_in_a_column_that_is_not_read_is_not_called_empty(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text("image,caption,text,title\na.jpg,,one,\n")
    (row,) = read_rows(path, DEFAULT_COLUMNS)
    assert (row.fault, row.unread) == ("no caption: empty is caption, title", ("text",))


def test_further_captions_of_a_picture_that_are_not_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"  # caption.1 is what pandas makes of a second column `caption`
    path.write_text("image,caption,Caption 2,caption.1,blip_caption,caption_id,text2,notes\na.jpg,a,b,c,d,7,,e\n")
    (row,) = read_rows(path, DEFAULT_COLUMNS)
    assert (row.fault, row.document) == (None, {"caption": "a"})
    assert row.unread == ("caption_2", "caption.1", "blip_caption")
    (row,) = read_rows(path, captions_file.Columns(caption="caption_2"))
    assert (row.document, row.unread) == ({"caption": "b"}, ())
    objects = tmp_path / "captions.jsonl"
    objects.write_text('{"image": "a.jpg", "caption_1": "x", "caption_2": "y"}\n{"image": "a.jpg", "caption_1": "x"}\n')
    both, one = read_rows(objects, DEFAULT_COLUMNS)
    hint = "; several captions of a picture are a json list in one column, or a row each with --join-rows"
    assert str(both.fault).endswith(f"the row has image, caption_1, caption_2{hint}")
    assert str(one.fault).endswith("the row has image, caption_1")
