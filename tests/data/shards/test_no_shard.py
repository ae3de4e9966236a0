"""A file that is named as a shard and is none: one line says what it is, before anything is written."""

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cosmos_scale.cli.main import main
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import picture, write_shards

RULE = "; rule: name the folder of the shards, or .tar files, as in 'FOLDER/{00000..00331}.tar' or '{a,b}.tar'"
BUILD = "; `cosmos-scale data build` makes shards of pictures and a file of captions"

FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shards.txt": (
        lambda path: path.write_text("/data/00000.tar\n/data/00001.tar\n"),
        f"is a text that lists shards, no shard{RULE}",
    ),
    "index.json": (lambda path: path, f"is the index of shards, no shard{RULE}"),
    "captions.csv": (lambda path: path.write_text("image,caption\n"), f"is a text, no shard{RULE}{BUILD}"),
    "captions.jsonl": (
        lambda path: path.write_text('{"image": "a"}'),
        f"is a JSON text, no shard{RULE}{BUILD}",
    ),
    "0.jpg": (
        lambda path: path.write_bytes(picture(0)),
        f"is a JPEG picture by its first bytes, no shard{RULE}{BUILD}",
    ),
    "empty": (lambda path: path.touch(), f"is empty, no shard{RULE}"),
    "zeros.bin": (lambda path: path.write_bytes(b"\1" + bytes(2000)), f"is no tar by its first bytes{RULE}"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_shard_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    folder = write_shards(tmp_path / "shards", [2])
    write, said = FILES[name]
    write(folder / name)
    before = sorted(tmp_path.rglob("*"))
    out = {command: ["--out", str(tmp_path / "out")] for command in ("index", "inspect")}
    for command in ("index", "verify", "inspect"):
        assert main(["data", command, str(folder / name), "--quiet", *out.get(command, [])]) == 2
        assert capsys.readouterr().err == f"cosmos-scale data {command}: {folder / name}: {said}\n"
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match=r"no shard|no tar"):
        index_shards(str(folder / "*"), tmp_path / "out", workers=1, progress=False)


@pytest.mark.parametrize("name", ["shard_0", "shard.0"])
def test_a_tar_of_another_name_is_a_shard(tmp_path: Path, name: str) -> None:
    folder = write_shards(tmp_path / "shards", [2])
    (tmp_path / "named").mkdir()
    shutil.copy(folder / "00000.tar", tmp_path / "named" / name)
    report = index_shards(str(tmp_path / "named" / "*"), tmp_path / "out", workers=1, progress=False)
    assert (report.shards, report.samples) == (1, 2)


@pytest.mark.parametrize("key", ["BZh9", "PAR1", "%PDF-1", "{x"])
@pytest.mark.parametrize("name", ["0.tar", "0.bin"])
def test_a_tar_whose_first_name_begins_as_another_kind_of_file_is_a_shard(tmp_path: Path, name: str, key: str) -> None:
    with tarfile.open(tmp_path / name, "w") as archive:
        for ending, data in (("jpg", picture(0)), ("txt", b"a cat")):
            member = tarfile.TarInfo(f"{key}.{ending}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    report = index_shards(str(tmp_path / name), tmp_path / "out", workers=1, progress=False)
    assert (report.shards, report.samples) == (1, 1)
