"""What the ranks print, on the launcher's own output: rank 0's lines as they are, the other ranks' with their place."""

import os
import re
import select
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

_MOST_WAITING = 10_000  # lines, where nobody takes the output: the ranks' files have all of them
_MOST_KNOWN = 10_000  # lines to compare with
_NUMBER = re.compile(r"\d+")
_PIECE = 4096  # bytes: a pipe that can be written to has room for as many (PIPE_BUF)


class Printer:
    """Prints lines from a thread of its own, so that an output which nobody reads holds nothing up.

    The thread writes to the descriptors and leaves Python's streams alone: a write that waits holds its stream's lock,
    and the program's last flush would wait for that lock without limit. An output that cannot be written is left out,
    and the other one says so.

    A line that ranks repeat, with other numbers in it, is printed for the first of them; the ranks' files have it each.
    """

    def __init__(self, command: str = "cosmos-scale launch") -> None:
        """command: how the launcher's own lines begin."""
        self._command = command
        self._waiting: deque[tuple[str, str]] = deque(maxlen=_MOST_WAITING)
        self._came = threading.Event()
        self._ends = threading.Event()
        self._gives_up = threading.Event()
        self._outputs = {
            "out": _Output("standard output", sys.stdout, self._gives_up.is_set),
            "err": _Output("standard error", sys.stderr, self._gives_up.is_set),
        }
        self._known: dict[str, int] = {}
        self.repeated = 0
        self._thread = threading.Thread(target=self._print_all, daemon=True)
        self._thread.start()

    def rank_line(self, line: str, rank: int, host: str, kind: str) -> None:
        """Print a line of a rank on the stream that it came from, "out" or "err"."""
        if not line.strip() and rank > 0:
            return
        if len(self._known) > _MOST_KNOWN:
            self._known.clear()
        first = self._known.setdefault(_NUMBER.sub("#", line), rank)
        if rank == 0:
            self._put(kind, line)
        elif first == rank:
            self._put(kind, f"{host}:{rank}: {line}")
        else:
            self.repeated += 1

    def say(self, line: str) -> None:
        """Print a line of the launcher itself, on standard error."""
        self._put("err", f"{self._command}: {line}")

    def close(self, seconds: float = 5.0) -> None:
        """Print what waits, and end; after some seconds give up an output that nobody reads.

        What the program prints afterwards to such an output is dropped too, since it would wait without limit.
        """
        self._ends.set()
        self._came.set()
        self._thread.join(seconds)
        self._gives_up.set()
        for output in self._outputs.values():
            if output.is_full():
                os.dup2(os.open(os.devnull, os.O_WRONLY), output.descriptor)

    def _put(self, kind: str, text: str) -> None:
        self._waiting.append((kind, text))
        self._came.set()

    def _print_all(self) -> None:
        while not (self._ends.is_set() and not self._waiting):
            self._came.wait()
            self._came.clear()
            while self._waiting and not self._gives_up.is_set():
                kind, text = self._waiting.popleft()
                self._print(kind, text)

    def _print(self, kind: str, text: str) -> None:
        try:
            self._outputs[kind].write(f"{text}\n")
        except OSError as error:
            name = self._outputs[kind].leave()
            other = self._outputs["out" if kind == "err" else "err"]
            with suppress(OSError):  # neither can be written
                other.write(f"warning: {name}: {error.strerror or error}; the run goes on without it\n")


class _Output:
    """A descriptor that lines are written to, piece by piece as there is room."""

    def __init__(self, name: str, stream: TextIO, gives_up: Callable[[], bool]) -> None:
        stream.flush()  # what was printed before stands before the lines
        self.descriptor = stream.fileno()
        self._name, self._encoding, self._gives_up = name, stream.encoding, gives_up
        self._is_left = False

    def write(self, text: str) -> None:
        """Write a text, as far as its reader takes it before the printer gives up."""
        data = text.encode(self._encoding, "backslashreplace")
        while data and not self._is_left and not self._gives_up():
            if not self.is_full(wait=0.2):
                data = data[os.write(self.descriptor, data[:_PIECE]) :]

    def is_full(self, wait: float = 0.0) -> bool:
        """Whether there is no room for a piece within some seconds; an output that cannot be written is not full."""
        poll = select.poll()
        poll.register(self.descriptor, select.POLLOUT)
        return not poll.poll(wait * 1000)

    def leave(self) -> str:
        """Write nothing any more; return the output's name."""
        self._is_left = True
        return self._name
