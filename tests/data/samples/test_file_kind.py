"""A file that is no text, whatever its name says, is refused by what it is, with the way to a text."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from cosmos_scale.cli.main import main
from cosmos_scale.data.prepare.datasets import DREAMLIP
from cosmos_scale.data.prepare.rows import caption_files, check_header
from cosmos_scale.data.tools.captions_file import read_rows
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets.captioned_files import open_pairs
from cosmos_scale.evaluation.prompts.texts import read_names
from cosmos_scale.testing.shard_files import picture

TEXT = b"image,caption\n0.jpg,a cat\n"


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, TEXT)
    return buffer.getvalue()


def as_parquet() -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"image": ["0.jpg"], "caption": ["a cat"]}), buffer)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("captions.csv")
        member.size = len(TEXT)
        archive.addfile(member, io.BytesIO(TEXT))
    return buffer.getvalue()


KINDS = {
    r"is gzip-compressed by its first bytes; rule: unpack it \(gzip -dc\)": gzip.compress(TEXT),
    r"is bzip2-compressed by its first bytes; rule: unpack it \(bzip2 -dc\)": bz2.compress(TEXT),
    r"is xz-compressed by its first bytes; rule: unpack it \(xz -dc\)": lzma.compress(TEXT),
    r"is a zip archive by its first bytes; rule: unpack it \(unzip -p\)": zipped("captions.csv"),
    "is an Excel workbook by its first bytes; rule: save it as CSV UTF-8": zipped("[Content_Types].xml", "xl/a.xml"),
    "is a parquet file by its first bytes; rule: write it as JSON lines": as_parquet(),
    r"is a tar by its first bytes; rule: unpack it \(tar -xf\)": tarred(),
    "is a JPEG picture by its first bytes; rule: name the file of texts": picture(0),
}

READERS: dict[str, Callable[[Path], object]] = {
    "build.csv": lambda path: list(read_rows(path)),
    "build.jsonl": lambda path: list(read_rows(path)),
    "prepare.csv": lambda path: check_header(path, DREAMLIP, "url"),
    "pairs.csv": lambda path: open_pairs(path, None),
    "pairs.tsv": lambda path: open_pairs(path, None),
    "pairs.jsonl": lambda path: open_pairs(path, None),
    "names.txt": read_names,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("said", KINDS)
def test_a_file_that_is_no_text_is_named_by_its_first_bytes(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_bytes(KINDS[said])
    with pytest.raises(UserError, match=said) as refusal:
        READERS[name](tmp_path / name)
    assert str(refusal.value).startswith(f"{tmp_path / name}: is ")


@pytest.mark.parametrize("first", ["BZh9", "PAR1", "ARROW1", "%PDF", "PK", "ustar", "\ufeffPAR1", "猫"])
def test_a_text_that_begins_with_the_letters_of_another_kind_is_a_text(tmp_path: Path, first: str) -> None:
    (tmp_path / "names.txt").write_text(f"{first}\na cat\n", encoding="utf-8")
    assert read_names(tmp_path / "names.txt") == ((first.lstrip("\ufeff"),), ("a cat",))


@pytest.mark.parametrize("data", [b"", TEXT])
@pytest.mark.parametrize("level", [1, 9])
def test_bzip2_is_told_at_any_level_and_size(tmp_path: Path, data: bytes, level: int) -> None:
    (tmp_path / "names.txt").write_bytes(bz2.compress(data, level))
    with pytest.raises(UserError, match="is bzip2-compressed by its first bytes"):
        read_names(tmp_path / "names.txt")


def test_another_ending_is_refused_with_the_way_to_a_text(tmp_path: Path) -> None:
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(TEXT))
    with pytest.raises(UserError, match=r"captions come as \.jsonl or \.csv; it is gzip-compressed .*gzip -dc"):
        list(read_rows(tmp_path / "c.csv.gz"))
    (tmp_path / "list.json").write_text("[{}]")
    with pytest.raises(UserError, match=r"list\.json: captions come as \.jsonl or \.csv; rule: of a list, `jq -c"):
        list(read_rows(tmp_path / "list.json"))
    with pytest.raises(UserError, match=r"captions come as \.csv or \.parquet; it is gzip-compressed .*gzip -dc"):
        caption_files([tmp_path / "c.csv.gz"])
    (tmp_path / "c.txt").write_bytes(TEXT)
    with pytest.raises(UserError, match=r"captions come as \.jsonl or \.csv$"):
        list(read_rows(tmp_path / "c.txt"))


def test_a_build_of_such_a_file_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "c.jsonl").write_bytes(gzip.compress(b"{}"))
    command = ["data", "build", "--images", str(tmp_path / "images"), "--captions", str(tmp_path / "c.jsonl")]
    assert main([*command, "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
