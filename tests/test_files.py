"""Files that are whole or not there: what stands after a block that fails, and what is said of it."""

import errno
import os
import re
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cosmos_scale.data.shards.scan import scan_shard
from cosmos_scale.errors import UserError
from cosmos_scale.files import (
    keep_foreign,
    make_folder,
    make_output_folder,
    replace_file,
    sync_folder,
    whole_file,
    writing,
)
from cosmos_scale.words import counted, with_article


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "table"
    with whole_file(path) as part:
        part.write_bytes(b"one")
        assert not path.exists()
        assert part.parent == tmp_path, "a rename is whole at once within one file system only"
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["table"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_block_leaves_the_file_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "table"
    path.write_bytes(b"old")
    with pytest.raises(error), whole_file(path) as part:  # noqa: PT012 - the block fails after a write
        part.write_bytes(b"ne")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["table"]


def test_a_block_may_decide_against_the_file(tmp_path: Path) -> None:
    with whole_file(tmp_path / "table") as part:
        part.write_bytes(b"nothing of use")
        part.unlink()
    assert os.listdir(tmp_path) == []


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "table"
    for data in (b"one", b"two"):
        replace_file(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["table"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match=r"folder: cannot be written: Is a directory"):
        replace_file(tmp_path / "folder", b"one")
    assert os.listdir(tmp_path) == ["folder"]
    with pytest.raises(UserError, match=r"none/table: cannot be written: No such file"):
        replace_file(tmp_path / "none" / "table", b"one")


def test_a_file_of_others_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "page"
    keep_foreign(path, b"<ours>", "page of ours")
    for own in (b"", b"a <ours> page"):
        path.write_bytes(own)
        keep_foreign(path, b"<ours>", "page of ours")
    keep_foreign(Path("/dev/null"), b"<ours>", "page of ours")
    path.write_bytes(b"notes")
    with pytest.raises(UserError, match=r"page: is there, and is no page of ours; rule: move it away, or name another"):
        keep_foreign(path, b"<ours>", "page of ours")


def test_other_errors_than_of_writing_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), writing(tmp_path):
        raise ValueError("mine")


def test_folders_are_made_with_those_above_them(tmp_path: Path) -> None:
    make_folder(tmp_path / "deep" / "folder")
    make_folder(tmp_path / "deep" / "folder")
    assert (tmp_path / "deep" / "folder").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/folder: cannot be made: Not a directory; name another folder with --out"):
        make_folder(tmp_path / "file" / "folder")


def test_the_disk_is_told_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: told.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    before = os.listdir("/proc/self/fd")
    sync_folder(tmp_path)
    assert told == [str(tmp_path)]
    assert len(os.listdir("/proc/self/fd")) == len(before), "the folder must be closed again"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    sync_folder(tmp_path)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"({os.strerror(number)}) cannot sync folders" in said
    sync_folder(tmp_path)
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_synced_for_other_reasons_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


def test_an_output_folder_that_takes_no_file_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_output_folder(tmp_path / "new" / "deep")
    assert list((tmp_path / "new" / "deep").iterdir()) == []

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(UserError, match=r"new: cannot be written to: Read-only file system; name .* with --out$"):
        make_output_folder(tmp_path / "new")


def test_numbers_with_their_nouns() -> None:
    assert (counted(1, "shard"), counted(0, "shard"), counted(1200, "shard")) == ("1 shard", "0 shards", "1,200 shards")
    assert counted(2, "shard is", "shards are") == "2 shards are"


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Files cannot grow beyond a number of bytes: a write up to there is cut short, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_nouns_have_their_article() -> None:
    nouns = ("int", "list", "object", "uint8", "int64", "NoneType", "OrderedDict", "EagerTensor", "array")
    assert [with_article(noun).split()[0] for noun in nouns] == ["an", "a", "an", "a", "an", "a", "an", "an", "an"]


def test_a_temporary_folder_without_room_for_a_shard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(bytes(10_240))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said = f"{tmp_path}: temporary files cannot be written: File too large; allow more (ulimit -f); rule: TMPDIR names "
    with files_of_at_most(100), pytest.raises(UserError, match=re.escape(said)):
        scan_shard(f"pipe:cat {shard}")
    assert list(tmp_path.iterdir()) == [shard]
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    with pytest.raises(UserError, match=r"^No usable temporary directory found in .*; rule: TMPDIR names a folder"):
        scan_shard(f"pipe:cat {shard}")
