"""The printer over outputs that are slow, stuck, full, or do not wait: every line that can be printed is."""

import os
import pty
import socket
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cosmos_scale.launch.printer import Printer

SECONDS = 60.0  # for what comes at once
LONG = "x" * 1000


@contextmanager
def printing(monkeypatch: pytest.MonkeyPatch, out: int, err: int, *, waits: float = SECONDS) -> Iterator[Printer]:
    """A printer over two descriptors, in the place of the process's own; waits: at its end, where nothing is taken."""
    with open(out, "w", closefd=False) as stdout, open(err, "w", closefd=False) as stderr:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        printer = Printer()
        try:
            yield printer
        finally:
            printer.close(waits)


class Reader:
    """Reads a descriptor in a thread, some bytes at a time with a pause before each, up to its end."""

    def __init__(self, descriptor: int, *, pause: float = 0.0, piece: int = 1 << 16) -> None:
        self.data = b""
        self._descriptor, self._pause, self._piece = descriptor, pause, piece
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            time.sleep(self._pause)
            try:
                piece = os.read(self._descriptor, self._piece)
            except OSError:  # of a terminal whose other end is closed
                return
            if not piece:
                return
            self.data += piece

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + SECONDS
        while text.encode() not in self.data:
            assert time.monotonic() < deadline, self.data[-2000:].decode(errors="replace")
            time.sleep(0.01)

    def lines(self) -> list[str]:
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        return self.data.decode().splitlines()


def test_an_output_that_nobody_reads_does_not_silence_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    unread, out = os.pipe()
    read, err = os.pipe()
    reader = Reader(read)
    with printing(monkeypatch, out, err, waits=0.5) as printer:
        for _ in range(200):
            printer.rank_line(LONG, 0, "a", "out")
        printer.say("rank 1 is lost")
        reader.wait_for("cosmos-scale launch: rank 1 is lost\n")
    # What the program prints after that would wait for ever: it goes nowhere.
    assert os.write(out, b"x" * (1 << 20)) == 1 << 20
    for descriptor in (unread, out, err):
        os.close(descriptor)


@pytest.mark.parametrize("kind", ["pipe", "socket", "terminal"])
def test_an_output_that_does_not_wait_gets_every_line(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """As programs on other event loops hand over: a write fails where there is no room for it."""
    read, out = {"pipe": os.pipe, "socket": _sockets, "terminal": _terminal}[kind]()
    os.set_blocking(out, False)
    reader = Reader(read, pause=0.001, piece=3000)
    with printing(monkeypatch, out, out) as printer:
        for number in range(1000):
            printer.rank_line(f"{number} {LONG}", 0, "a", ("out", "err")[number % 2])
    os.close(out)
    assert reader.lines() == [f"{number} {LONG}" for number in range(1000)]  # of both, in their order


def _sockets() -> tuple[int, int]:
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def _terminal() -> tuple[int, int]:
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    return ours, theirs


def test_a_stopped_terminal_goes_on_where_it_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-S, and Ctrl-Q: of what came meanwhile the newest lines are printed, and how many are not."""
    ours, theirs = _terminal()
    monkeypatch.setattr("cosmos_scale.launch.printer._MOST_WAITING", 10)
    reader = Reader(ours)
    with printing(monkeypatch, theirs, theirs) as printer:
        printer.say("before")
        reader.wait_for("before\n")
        termios.tcflow(theirs, termios.TCOOFF)
        for number in range(100):
            printer.say(f"line {number}")
        time.sleep(0.3)
        assert b"line" not in reader.data
        termios.tcflow(theirs, termios.TCOON)
        reader.wait_for("line 99\n")
    os.close(theirs)
    lines = reader.lines()[1:]
    (left,) = [line for line in lines if "left out, which nobody took; the ranks' files in logs/ have theirs" in line]
    assert len(lines) - 1 + int(left.split()[1]) == 100


def test_a_slow_reader_gets_the_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than the printer waits for one that takes nothing."""
    read, out = os.pipe()
    reader = Reader(read, pause=0.2)
    with printing(monkeypatch, out, out, waits=3.0) as printer:
        for _ in range(1500):
            printer.rank_line(LONG, 0, "a", "out")
        printer.say("finished")
    os.close(out)
    lines = reader.lines()
    assert len(lines) == 1501
    assert lines[-1] == "cosmos-scale launch: finished"


def test_a_full_disk_under_one_output_is_told_once_on_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    read, err = os.pipe()
    reader = Reader(read)
    out = os.open("/dev/full", os.O_WRONLY)
    with printing(monkeypatch, out, err) as printer:
        for _ in range(3):
            printer.rank_line("here", 0, "a", "out")
    for descriptor in (out, err):
        os.close(descriptor)
    assert reader.lines() == ["warning: standard output: No space left on device; the run goes on without it"]
