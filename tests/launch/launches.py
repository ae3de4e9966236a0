"""Launches of test ranks: started as processes of their own, and ended by the test."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

HERE = socket.gethostname()
SECONDS = 120.0  # for what takes some at most


class Ended(NamedTuple):
    status: int
    output: str
    errors: str

    def require(self, status: int) -> "Ended":
        assert self.status == status, f"{self.status}\n{self.output}\n{self.errors}"
        return self


class Launch:
    """A launch under way."""

    def __init__(self, folder: Path, process: "subprocess.Popen[bytes]") -> None:
        self.folder, self.process = folder, process

    def wait_for(self, *names: str) -> None:
        self.wait_until(lambda: all((self.folder / name).exists() for name in names), " ".join(names))

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited for {what} in vain\n{self.text()}"
            time.sleep(0.02)

    def pid_of(self, rank: int) -> int:
        """The process of a rank that waits."""
        self.wait_until(lambda: (self.folder / f"waits-{rank}").exists(), f"rank {rank}")
        self.wait_until(lambda: bool((self.folder / f"waits-{rank}").read_text()), f"rank {rank}")
        return int((self.folder / f"waits-{rank}").read_text())

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, seconds: float = SECONDS) -> Ended:
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the launch still runs\n{self.text()}") from None
        return Ended(status, (self.folder / "out").read_text(), (self.folder / "err").read_text())

    def text(self) -> str:
        files = (self.folder / name for name in ("out", "err"))
        return "".join(file.read_text() for file in files if file.exists())


@contextmanager
def launched(folder: Path, *words: str, ranks: int = 2, **fields: Any) -> Iterator[Launch]:
    """Start a launch of test ranks on this host (or on `hosts`); nothing is left of it."""
    folder.mkdir(exist_ok=True)
    fields.setdefault("hosts", [[[HERE, ranks]]])
    command = [sys.executable, "-m", "tests.launch.driver", str(folder), json.dumps(fields), *words]
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
    launch = Launch(folder, process)
    try:
        yield launch
    finally:
        process.kill()
        process.wait()
        for file in folder.glob("waits-*"):
            with suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read_text()), signal.SIGKILL)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def run_to_end(folder: Path, *words: str, **fields: Any) -> Ended:
    with launched(folder, *words, **fields) as launch:
        return launch.end()
