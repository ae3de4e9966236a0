"""Texts of published captions stay what they are, or their row is rejected: none is changed in passing."""

import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from cosmos_scale.cli.main import main
from cosmos_scale.data.prepare.datasets import PIXELPROSE
from tests.data.prepare.downloads import (
    download,
    dreamlip_row,
    pixelprose_row,
    url,
    write_dreamlip,
    write_folder,
    write_tar,
)
from tests.data.prepare.test_prepare import read_all, rejected, run


def write_vlm_captions(path: Path, captions: pyarrow.Array) -> None:
    rows = [pixelprose_row(number) for number in range(len(captions))]
    table = pyarrow.Table.from_pylist([{**row, "original_caption": None} for row in rows])
    place = table.column_names.index("vlm_caption")
    path.parent.mkdir()
    pyarrow.parquet.write_table(table.set_column(place, "vlm_caption", captions), path)


def not_utf8(texts: list[bytes]) -> pyarrow.Array:
    """Texts that some writers mark as UTF-8 without looking."""
    plain = pyarrow.array(texts, pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(plain), plain.buffers())


@pytest.mark.parametrize(
    ("captions", "expected", "reason"),
    [
        (pyarrow.array([b"One cat.", "Caf\u00e9.".encode()]), [["One cat"], ["Caf\u00e9"]], None),
        (pyarrow.array([b"One cat.", b"Caf\xe9."]), [["One cat"], None], "not UTF-8: byte 0xe9 in vlm_caption"),
        (not_utf8([b"One cat.", b"Caf\xe9."]), [["One cat"], None], "not UTF-8: byte 0xe9 in vlm_caption"),
        (pyarrow.array([[b"One"], [b"Two", b"3"]]), [["One"], ["Two", "3"]], None),
        # As in a cell of CSV.
        (pyarrow.array(['["One.", "Two."]', "['One.' 'Two.']"]), [["One.", "Two."], ["One.", "Two."]], None),
        (
            pyarrow.array(["nan", "One cat."]),
            [None, ["One cat"]],
            "no caption: every captions cell of its row is empty",
        ),
        (pyarrow.array(["a\0b", "One cat."]), [None, ["One cat"]], "not text: NUL in it"),
        (
            pyarrow.array([None, datetime.date(2020, 1, 2)]),
            [None, None],
            "wrong type: vlm_caption is neither a text nor a list of texts",
        ),
    ],
    ids=[
        "bytes",
        "bytes that are no text",
        "text that is none",
        "lists of bytes",
        "lists as text",
        "nan",
        "NUL",
        "dates",
    ],
)
def test_a_parquet_files_captions(
    tmp_path: Path, captions: Any, expected: list[list[str] | None], reason: str | None
) -> None:
    write_vlm_captions(tmp_path / "captions" / "0.parquet", captions)
    write_tar(tmp_path / "images", "00000", [*map(download, range(3))])
    # A row that is sound, so that something is left.
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([pixelprose_row(2)]), tmp_path / "captions" / "1.parquet")
    run(tmp_path, PIXELPROSE)
    found = {document["url"]: document.get("caption") for _, document in read_all(tmp_path / "out").values()}
    wanted = {url(number): sentences for number, sentences in enumerate(expected) if sentences}
    assert {name: found[name] for name in wanted} == wanted
    assert len(found) == len(wanted) + 1
    lines = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert (reason is None) == (not lines)
    if reason is not None:
        where = "" if reason.startswith("no caption") else "captions row cannot be read: "
        assert f"{where}{reason}" in lines


def test_half_of_a_surrogate_pair_and_nul_reject_their_rows(tmp_path: Path) -> None:
    (tmp_path / "captions").mkdir()
    rows = [dreamlip_row(number) for number in range(3)]
    rows[0][2] = r'["One \ud83d."]'
    rows[1][1] = "nothing\0"
    write_dreamlip(tmp_path / "captions" / "cc3m.csv", rows)
    write_tar(tmp_path / "images", "00000", [*map(download, range(3))])
    assert run(tmp_path).samples == 1
    assert {reason for *_, reason in rejected(tmp_path / "out")} == {
        "not text",
        "captions row cannot be read",
        "image without captions",
    }


def test_tars_beside_the_images_that_are_not_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "captions").mkdir()
    write_dreamlip(tmp_path / "captions" / "cc3m.csv", [dreamlip_row(0)])
    write_tar(tmp_path / "images", "00000", [download(0)])
    (tmp_path / "images" / "00003.tar.gz").touch()
    arguments = ["--captions", str(tmp_path / "captions"), "--images", str(tmp_path / "images")]
    assert main(["data", "prepare", "dreamlip", *arguments, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    said = f"{tmp_path / 'images'}: 1 other tar in the folder (00003.tar.gz) is not read: its own .tar files are"
    assert said in capsys.readouterr().out


def test_pictures_beside_the_shards_of_images_that_are_not_read_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "captions").mkdir()
    write_dreamlip(tmp_path / "captions" / "cc3m.csv", [dreamlip_row(number) for number in range(3)])
    write_tar(tmp_path / "images", "00000", [download(0)])
    write_folder(tmp_path / "images", "00001", [download(1)])
    write_folder(tmp_path / "images", "shard-2", [download(2)])
    (tmp_path / "images" / "3.PNG").write_bytes(b"")
    arguments = ["--captions", str(tmp_path / "captions"), "--images", str(tmp_path / "images")]
    assert main(["data", "prepare", "dreamlip", *arguments, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "pictures in 2 places (., shard-2) are not read: .tar files and folders named by numbers are" in printed


def test_what_macos_leaves_beside_files_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "captions").mkdir()
    write_dreamlip(tmp_path / "captions" / "cc3m.csv", [dreamlip_row(0)])
    write_tar(tmp_path / "images", "00000", [download(0)])
    for name in ("captions/._cc3m.csv", "images/._00000.tar", "images/._00000.parquet"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    assert run(tmp_path).samples == 1
