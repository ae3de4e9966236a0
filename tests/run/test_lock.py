"""The lock of a run: a second launch is refused by name, and what a dead one left holds nobody up."""

import errno
import fcntl
import json
import os
import queue
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cosmos_scale.errors import UserError
from cosmos_scale.run.lock import DEAD_AFTER, LAUNCH_TOKEN, LOCK_FILE, RANKS_LOCK_FILE, RunLock, wait_for_ranks

SECONDS = 60.0  # for what takes one at most

HOLD = """
import sys, time
from pathlib import Path
from cosmos_scale.run.lock import RunLock
with RunLock(Path(sys.argv[1]), print, file=sys.argv[2], touched_every=0.05):
    print("held", flush=True)
    time.sleep(300)
"""


@contextmanager
def held(folder: Path, file: str = LOCK_FILE) -> "Iterator[subprocess.Popen[str]]":
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), file], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_launch_is_refused_and_a_killed_one_holds_nobody_up(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held(folder) as process:
        said = f"run: this run is launched already, on host {socket.gethostname()} by process {process.pid} since 20"
        with pytest.raises(UserError, match=re.escape(said)), RunLock(folder, print):
            pass
        process.kill()
        process.wait()
        start = time.monotonic()
        with RunLock(folder, print):
            assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()
        assert time.monotonic() - start < DEAD_AFTER  # nobody waited for a sign of life
    with RunLock(folder, print):  # given back
        pass


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_without_locks_of_the_file_system_the_process_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with held(tmp_path) as process:
        with (
            pytest.raises(UserError, match=f"by process {process.pid} since"),
            RunLock(tmp_path, print, touched_every=0.1),
        ):
            pass
        process.kill()
        process.wait()
        with RunLock(tmp_path, print, touched_every=0.1, dead_after=0.5):
            pass


def test_touches_tell_whether_a_launch_on_another_host_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks that count on one host alone are taken by both hosts."""
    with RunLock(tmp_path, print, touched_every=0.05):
        file = tmp_path / LOCK_FILE
        holder = json.loads(file.read_text()) | {"host": "elsewhere", "pid": 77}
        file.write_text(json.dumps(holder))
        with (
            pytest.raises(UserError, match="on host elsewhere by process 77"),
            RunLock(tmp_path, print, touched_every=0.1, dead_after=SECONDS),
        ):
            pass
    file.write_text(json.dumps(holder))  # it died
    with RunLock(tmp_path, print, touched_every=0.1, dead_after=0.5):
        assert json.loads(file.read_text())["host"] == socket.gethostname()


def test_a_touch_that_lies_ahead_holds_nobody_up(tmp_path: Path) -> None:
    """The clock of a host that died was an hour ahead of this one's, or this one's is behind."""
    said: list[str] = []
    holder = json.dumps({"host": "elsewhere", "pid": 77, "started": "1", "since": "2026", "token": "t"})
    ahead = time.time() + 3600
    (tmp_path / RANKS_LOCK_FILE).write_text(holder)
    os.utime(tmp_path / RANKS_LOCK_FILE, (ahead, ahead))
    wait_for_ranks(tmp_path, said.append, seconds=SECONDS, dead_after=0.3)
    assert "for the end of an earlier launch's ranks, the first one on host elsewhere by process 77" in said[0]
    file = tmp_path / LOCK_FILE
    file.write_text(holder)
    os.utime(file, (ahead, ahead))
    start = time.monotonic()
    with RunLock(tmp_path, said.append, touched_every=0.1, dead_after=0.5):
        assert time.monotonic() - start < SECONDS  # and not for an hour
        assert json.loads(file.read_text())["host"] == socket.gethostname()


def test_a_deleted_folder_lets_nobody_in(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held(folder) as process:
        named = (folder / LOCK_FILE).read_text()
        shutil.rmtree(folder)
        deadline = time.monotonic() + SECONDS
        while not (folder / LOCK_FILE).exists() or (folder / LOCK_FILE).read_text() != named:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(UserError, match=f"by process {process.pid} since"), RunLock(folder, print):
            pass


def test_a_folder_that_is_moved_while_a_run_trains_is_told(tmp_path: Path) -> None:
    folder, said = tmp_path / "run", queue.Queue[str]()
    with RunLock(folder, said.put, file=RANKS_LOCK_FILE, touched_every=0.05):
        folder.rename(tmp_path / "moved")
        line = said.get(timeout=SECONDS)
        assert line.startswith(f"{folder / RANKS_LOCK_FILE}: gone while the run trains, with all that lay beside it if")
        assert line.endswith(f"the folder was deleted or moved; the run goes on in {folder}")
        assert (folder / RANKS_LOCK_FILE).exists()


def test_a_lock_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"launch\.lock: cannot be written"), RunLock(tmp_path / "run", print):
        pass


def test_a_passing_error_of_the_disk_refuses_no_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing_fsync(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing_fsync)
    with RunLock(tmp_path, print):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_ranks_of_a_dead_launch_are_waited_for_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    wait_for_ranks(tmp_path, said.append)  # nobody trains
    with held(tmp_path, RANKS_LOCK_FILE) as rank:
        with pytest.raises(UserError, match=f"ranks of an earlier launch .* by process {rank.pid} since .* end them"):
            wait_for_ranks(tmp_path, said.append, seconds=0.0)
        with held(tmp_path) as launch:
            wait_for_ranks(tmp_path, said.append)  # its own lock refuses this start
            assert not said
            token = json.loads((tmp_path / LOCK_FILE).read_text())["token"]
            monkeypatch.setenv(LAUNCH_TOKEN, token)  # as of a rank of that launch
            rank.kill()
            wait_for_ranks(tmp_path, said.append)
            assert launch.poll() is None
    assert all(f"by process {rank.pid} since" in line for line in said)
