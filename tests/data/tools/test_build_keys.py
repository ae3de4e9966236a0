"""Keys of samples that a column of the captions file says, in place of the rows' numbers."""

import json
from pathlib import Path

import pytest

from cosmos_scale.cli.main import main
from cosmos_scale.testing.shard_files import open_folder, picture


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(picture(number))
    return tmp_path


def arguments(inputs: Path, captions: str, *more: str) -> list[str]:
    out = ["--out", str(inputs / "out"), "--samples-per-shard", "2", "--workers", "1", "--quiet"]
    return ["data", "build", "--images", str(inputs / "images"), "--captions", str(inputs / captions), *out, *more]


def keys(folder: Path) -> list[str]:
    index = open_folder(folder)
    return [index.locate(number).entry.key for number in range(len(index))]


def reasons(folder: Path) -> list[tuple[int, str, str]]:
    lines = map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())
    return [(line["row"], line["key"], line["reason"].partition(";")[0]) for line in lines]


def test_a_column_says_the_keys(inputs: Path) -> None:
    (inputs / "c.csv").write_text("Image,Caption,Photo ID\n0.jpg,a cat,cat 7\n1.jpg,a dog,007\n2.jpg,a cow,é\n")
    assert main(arguments(inputs, "c.csv", "--key", "photo id")) == 0
    assert keys(inputs / "out") == ["cat 7", "007", "é"]
    assert main(["data", "verify", str(inputs / "out"), "--workers", "1", "--quiet"]) == 0


def test_keys_that_cannot_be_reject_their_rows(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["a.b", "a/b", "", None, 1.5, True, "__a", "x" * 201, "a\nb"]
    rows = [{"image": "0.jpg", "caption": "x", "id": key} for key in [7, *wrong, "7", "last"]]
    (inputs / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(arguments(inputs, "c.jsonl", "--key", "id")) == 0
    assert "1 row rejected: key of another row" in capsys.readouterr().out
    assert keys(inputs / "out") == ["7", "last"]
    found = reasons(inputs / "out")
    assert [row for row, _, _ in found] == list(range(2, 12))
    assert found[0] == (2, "000000002", "wrong key: 'a.b'")
    assert found[2] == (4, "000000004", "no key: --key names an empty one")
    assert found[-1] == (11, "000000011", "key of another row: 7 is the key of row 1")


def test_rows_of_one_picture_have_the_key_of_the_first(inputs: Path) -> None:
    rows = [{"image": name, "caption": "x", "id": key} for name, key in (("0.jpg", 5), ("1.jpg", 6), ("0.jpg", 5))]
    (inputs / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(arguments(inputs, "c.jsonl", "--key", "id", "--join-rows")) == 0
    assert keys(inputs / "out") == ["5", "6"]
    assert reasons(inputs / "out") == []


def test_a_key_that_is_no_column_is_refused(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (inputs / "c.csv").write_text("image,caption\n0.jpg,a cat\n")
    assert main(arguments(inputs, "c.csv", "--key", "id")) == 2
    assert capsys.readouterr().err.endswith("c.csv: no column --key id among image, caption\n")
    assert not (inputs / "out").exists()


def test_a_whole_number_among_floats_is_the_key_without_its_point(inputs: Path) -> None:
    """As pandas writes a column of numbers in which a cell is empty, to either form."""
    (inputs / "c.csv").write_text("image,caption,id\n0.jpg,a cat,7.0\n1.jpg,a dog,-8.0\n2.jpg,a cow,\n3.jpg,an ox,7\n")
    assert main(arguments(inputs, "c.csv", "--key", "id")) == 0
    assert keys(inputs / "out") == ["7", "-8"]
    assert reasons(inputs / "out") == [
        (3, "000000003", "no key: --key names an empty one"),
        (4, "000000004", "key of another row: 7 is the key of row 1"),
    ]
    rows = [{"image": "0.jpg", "caption": "x", "id": key} for key in (7.0, 0.0, "007.0", 8)]
    (inputs / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (inputs / "out").rename(inputs / "before")
    assert main(arguments(inputs, "c.jsonl", "--key", "id")) == 0
    assert keys(inputs / "out") == ["7", "0", "8"]
    assert reasons(inputs / "out") == [(3, "000000003", "wrong key: '007.0'")]


def test_a_key_of_another_type_is_rejected_by_its_type(inputs: Path) -> None:
    values = [1.5, 1e20, 12345678901234567.0, True, [7], {"a": 7}, "last"]
    rows = [{"image": "0.jpg", "caption": "x", "id": key} for key in values]
    (inputs / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(arguments(inputs, "c.jsonl", "--key", "id")) == 0
    assert keys(inputs / "out") == ["last"]
    assert [reason for _, _, reason in reasons(inputs / "out")] == [
        "wrong key: 1.5 is a float",
        "wrong key: 1e+20 is a float",
        "wrong key: 1.2345678901234568e+16 is a float",
        "wrong key: true is true or false",
        "wrong key: [7] is a list",
        'wrong key: {"a": 7} is an object',
    ]


@pytest.mark.parametrize("half", [0xD83D, 0xDCE9])
def test_a_key_with_half_of_a_surrogate_pair_rejects_its_row(inputs: Path, half: int) -> None:
    """A tar cannot have the first as a name, and has the second as a byte that is no UTF-8: another key."""
    rows = [{"image": "0.jpg", "caption": "x", "id": key} for key in (f"a{chr(half)}", "\U0001f600")]
    (inputs / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(arguments(inputs, "c.jsonl", "--key", "id")) == 0
    assert keys(inputs / "out") == ["\U0001f600"]
    escaped = f"\\u{half:04x}"
    rule = f"is no text: half of a surrogate pair, {escaped}, is in it"
    assert reasons(inputs / "out") == [(1, "000000001", f"wrong key: 'a{escaped}' {rule}")]
