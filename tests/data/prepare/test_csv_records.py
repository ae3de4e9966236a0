"""Records of CSV files: cells may span lines; a quote left open costs its own row, and is named."""

import csv
import io
import random
from pathlib import Path

import pytest

from cosmos_scale.data.prepare import csv_records
from cosmos_scale.data.prepare.csv_records import CsvRecord, read_header, read_records


def read(text: str) -> list[CsvRecord]:
    return list(read_records(io.StringIO(text, newline="")))


def test_sound_files_are_read_as_pythons_reader_does() -> None:
    draw = random.Random(0)
    pieces = ["a", "b c", ",", '"', "\n", "\r\n", "é", "''", " "]
    for _ in range(300):
        rows = [["".join(draw.choices(pieces, k=draw.randrange(6))) for _ in range(3)] for _ in range(6)]
        file = io.StringIO(newline="")
        csv.writer(file, quoting=draw.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))).writerows(rows)
        records = read(file.getvalue())
        assert [record.cells for record in records] == rows
        assert [record.fault for record in records] == [None] * 6
        assert sum(record.lines for record in records) == len(file.getvalue().splitlines())


def test_rows_behind_a_second_header_in_another_order_have_a_fault() -> None:
    header, turned = "image,caption,alt", "image,alt,caption"
    rows = [header, "0.jpg,a ball,IMG0", header, "1.jpg,a cat,IMG1", turned, "2.jpg,IMG2,a dog", "", "3.jpg,IMG3,a hat"]
    rows += [header, "4.jpg,a sun,IMG4"]
    records = read("\n".join(rows) + "\n")
    assert [record.line for record in records] == list(range(1, len(rows) + 1))
    said = "line 5 is a header again, with its columns in another order"
    assert [record.fault for record in records] == [None] * 4 + [said, said, None, said, None, None]


OPEN = '1.jpg,"a cat\n'
PLAIN = [f"{number}.jpg,caption {number}\n" for number in range(2, 1002)]


@pytest.mark.parametrize(
    ("rest", "sign"),
    [
        (PLAIN[:998], "the file ends in its cell; the 998 lines behind it may belong to it"),
        (PLAIN, "its cell does not end within 1,000 lines; the 999 lines behind it may belong to it"),
        ([*PLAIN[:5], '7.jpg,"a dog"\n'], "another quote follows it; the 6 lines"),
        ([*PLAIN[:5], '7.jpg,a board of 12"\n'], "its cell is made of rows; the 6 lines"),
        ([PLAIN[0], '3.jpg,a board of 12"\n'], "its cell is made of rows; the 2 lines"),
        (['3.jpg,a board of 12"\n'], "its cell is made of rows; the line behind it"),
    ],
)
def test_an_open_quote_loses_its_row_only(rest: list[str], sign: str) -> None:
    records = read("image,caption\n0.jpg,sound\n" + OPEN + "".join(rest))
    assert [record.line for record in records] == list(range(1, len(rest) + 4))
    assert [bool(record.fault) for record in records] == [False, False, True] + [False] * len(rest)
    assert str(records[2].fault).startswith(f"unclosed quote: opened on line 3, {sign}")


@pytest.mark.parametrize(
    "row",
    [
        '0.jpg,"a sign saying "stop" here"',
        '0.jpg,"a 12" ruler"',
        r'0.jpg,"say \\"hi\\" now"',
        '0.jpg,"a sign, "stop", here"',
        '"0.jpg" ,a cat',
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_a_quote_that_is_not_doubled_costs_its_row(row: str, end: str) -> None:
    records = read(f"image,caption\n1.jpg,sound\n{row}{end}")
    assert [bool(record.fault) for record in records] == [False, False, True]
    assert (
        records[2].fault
        == 'stray quote: on line 3; a quote inside a quoted cell is written twice (""), not with a backslash'
    )


def test_quotes_outside_quoted_cells_are_text() -> None:
    records = read('image,caption\n0.jpg,a 12" ruler\n1.jpg,a "stop" sign\n2.jpg,"a ""stop"" sign"\n')
    assert [record.fault for record in records] == [None] * 4
    assert [record.cells[1] for record in records[1:]] == ['a 12" ruler', 'a "stop" sign', 'a "stop" sign']


def test_empty_lines_before_the_header_are_stepped_over() -> None:
    records = read("\n\r\nimage,caption\n0.jpg,sound\n1.jpg\n")
    assert read_header(Path("c.csv"), iter(records)) == ["image", "caption"]
    assert [record.line for record in records] == [1, 2, 3, 4, 5]
    assert records[3] == CsvRecord(4, 1, ["0.jpg", "sound"], None)
    assert records[4].fault == "wrong number of cells: 1, the header has 2"
    assert read_header(Path("c.csv"), iter(read("\n\n"))) == []


def test_lines_that_end_in_cr_are_named() -> None:
    """As prepare feeds lines: cut at LF, so that rows keep their bytes."""
    (record,) = read_records(["image,caption\r0.jpg,a\r1.jpg,b\r"])
    assert record.fault == "not csv: CR inside line 1; rule: lines end in LF, or CR and LF"
    records = list(read_records(["image,caption\n", "0.jpg,a\rb\n", "1.jpg,b\n"]))
    assert [bool(record.fault) for record in records] == [False, True, False]


def test_a_row_of_a_wrong_number_of_cells_names_its_lines() -> None:
    records = read('image,caption\n0.jpg,"open\n1.jpg,", a dog"\n2.jpg,sound\n')
    assert records[1].fault == (
        "wrong number of cells: 3, the header has 2; it takes lines 2 to 3: is a quote in it left open?"
    )
    assert records[2] == CsvRecord(4, 1, ["2.jpg", "sound"], None)


def test_the_quote_is_named_where_it_opens_not_where_its_row_begins() -> None:
    records = read('image,a,b\n0.jpg,"two\nlines","open\n1.jpg,x,y\n')
    assert [(record.line, record.lines, bool(record.fault)) for record in records] == [
        (1, 1, False),
        (2, 2, True),
        (4, 1, False),
    ]
    assert "opened on line 3" in str(records[1].fault)


def test_a_text_of_many_lines_is_a_cell() -> None:
    text = "\n".join(f"line {number}, of a poem, and more" for number in range(900))
    assert read(f'image,caption\n0.jpg,"{text}"\n')[1] == CsvRecord(2, 900, ["0.jpg", text], None)


def test_a_cell_of_too_many_characters_loses_its_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_records, "CELL_LIMIT", 100)
    records = read('image,caption\n0.jpg,"' + "x" * 60 + "\n" + "y" * 60 + "\n2.jpg,sound\n")
    assert [record.line for record in records] == [1, 2, 3, 4]
    assert "not csv" in str(records[1].fault)
    assert "the line behind it may belong to it" in str(records[1].fault)
    assert records[3] == CsvRecord(4, 1, ["2.jpg", "sound"], None)


def test_a_quoted_cell_may_stand_behind_spaces() -> None:
    lines = ['image, "caption"', '1.jpg, "a cat, and a dog"', '2.jpg,  "say ""hi"""', '3.jpg, "Hello" is written on it']
    lines += ['4.jpg, a 12" ruler', '5.jpg,"a board, ""that"" one"', '6.jpg, "left open', "7.jpg, plain"]
    records = list(read_records(io.StringIO("\n".join(lines), newline=""), spaced=True))
    assert [record.cells for record in records] == [
        ["image", "caption"],
        ["1.jpg", "a cat, and a dog"],
        ["2.jpg", 'say "hi"'],
        ["3.jpg", ' "Hello" is written on it'],
        ["4.jpg", ' a 12" ruler'],
        ["5.jpg", 'a board, "that" one'],
        ["6.jpg", ' "left open'],
        ["7.jpg", " plain"],
    ]
    faults = [record.fault for record in records]
    wrong = "stray quote: on line 7 a quote behind a space is not closed; rule: no space before a quoted cell"
    assert faults == [None] * 6 + [wrong, None]
