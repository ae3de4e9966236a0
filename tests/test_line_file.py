"""Lines that a run appends: they wait where the disk fails, and no file that others know by another name grows."""

import errno
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from cosmos_scale import line_file
from cosmos_scale.line_file import LineFile
from tests.test_files import files_of_at_most


def test_lines_that_cannot_be_written_wait_and_stay_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "new" / "lines"
    file = LineFile(path)
    file.append(["one", "two"])
    with files_of_at_most(10):
        for line in ("three", "four"):  # of the first the disk takes two bytes
            file.append([line])
            assert path.read_text() == "one\ntwo\n"
    file.append(["five"])
    assert path.read_text() == "one\ntwo\nthree\nfour\nfive\n"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "new/lines: cannot be written: No space left on device; its lines are kept" in said[0]
    assert said[1] == f"{path}: is written again"


def test_a_file_that_is_deleted_or_emptied_is_told_and_begun_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lines"
    path.touch()
    file = LineFile(path)
    file.append(["one"])
    ways: list[Callable[[], object]] = [path.unlink, partial(os.truncate, path, 0)]
    for vanish in ways:
        file.append(["two"])
        vanish()
        caplog.clear()
        file.append(["three"])
        file.append(["four"])
        assert path.read_text() == "three\nfour\n"
        assert [record.getMessage() for record in caplog.records] == [
            f"{path}: was deleted or emptied, with the lines before; those from now on are written"
        ]


def test_any_error_of_the_disk_is_one_that_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO at the write, a folder that is away, a folder in the way."""
    path = tmp_path / "folder" / "lines"
    file = LineFile(path)
    path.mkdir(parents=True)
    file.append(["one"])
    path.rmdir()
    path.parent.rmdir()
    path.parent.write_text("away")
    file.append(["two"])
    path.parent.unlink()

    def failing(*others: object, **named: object) -> object:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(line_file, "open", failing, raising=False)
    file.append(["three"])
    assert not path.exists()
    monkeypatch.undo()
    file.append([])
    assert path.read_text() == "one\ntwo\nthree\n"


def test_a_part_that_cannot_be_cut_off_stays_a_line_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    path.write_text("1234\n")
    file = LineFile(path)

    def refuse(file: int, size: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "ftruncate", refuse)
    with files_of_at_most(7):
        file.append(["abcd"])
    file.append(["efgh"])
    file.append(["ijkl"])
    assert path.read_text() == "1234\nab\nabcd\nefgh\nijkl\n"


def test_a_copy_by_hard_links_keeps_the_lines_of_its_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`cp -al runs/a runs/before`, a snapshot that takes no room: rsync and backups make them too."""
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "lines", tmp_path / "lines"
    link.symlink_to(target)
    file = LineFile(link, alone=True)
    file.append(["one"])
    os.link(target, tmp_path / "before")
    file.append(["two"])
    file.append(["three"])
    assert (tmp_path / "before").read_text() == "one\n"
    assert target.read_text() == "one\ntwo\nthree\n"
    assert link.is_symlink()
    os.link(target, tmp_path / "full")
    with files_of_at_most(8):
        file.append(["four"])
    file.append(["five"])
    assert (tmp_path / "full").read_text() == "one\ntwo\nthree\n"
    assert link.read_text() == "one\ntwo\nthree\nfour\nfive\n"
    assert len(caplog.records) == 2
    assert sorted(os.listdir(tmp_path / "disk")) == ["lines"]


def test_of_too_many_lines_the_oldest_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(line_file, "MOST_KEPT", 3)
    (tmp_path / "lines").mkdir()
    file = LineFile(tmp_path / "lines")
    for number in range(5):
        file.append([str(number)])
    (tmp_path / "lines").rmdir()
    file.append(["5"])
    assert (tmp_path / "lines").read_text() == "2\n3\n4\n5\n"
    assert caplog.records[-1].getMessage().endswith("is written again; lines lost: 2")


def test_what_is_lost_at_the_end_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "lines").mkdir()
    file = LineFile(tmp_path / "lines")
    file.append(["1", "2"])
    file.close()
    assert caplog.records[-1].levelno == logging.WARNING
    assert caplog.records[-1].getMessage().endswith("cannot be written still; lines lost: 2")
