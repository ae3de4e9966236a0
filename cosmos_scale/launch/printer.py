"""What the ranks print, on the launcher's own output: rank 0's lines as they are, the other ranks' with their place."""

import os
import re
import select
import sys
import threading
import time
from collections import deque
from typing import TextIO

from cosmos_scale.words import counted

_MOST_WAITING = 10_000  # lines, where nobody takes the output: the ranks' files have all of them
_MOST_KNOWN = 10_000  # lines to compare with
_NUMBER = re.compile(r"\d+")
_PIECE = 4096  # bytes: a pipe that can be written to has room for as many (PIPE_BUF)
_LOOK = 0.2  # seconds
_SEE_FILES = "the ranks' files in logs/ have theirs"


class Printer:
    """Prints lines from threads of its own, so that an output which nobody reads holds nothing up.

    Each output has a thread, so that one which nobody reads does not silence the other. The threads write to the
    descriptors and leave Python's streams alone: a write that waits holds its stream's lock, and the program's last
    flush would wait for that lock without limit. An output that cannot be written is left out, and the other one says
    so.

    A line that ranks repeat, with other numbers in it, is printed for the first of them; the ranks' files have it each.
    """

    def __init__(self, command: str = "cosmos-scale launch") -> None:
        """command: how the launcher's own lines begin."""
        self._command = command
        out, err = _Output("standard output", sys.stdout), _Output("standard error", sys.stderr)
        self._descriptors = {out.descriptor, err.descriptor}
        if os.path.sameopenfile(out.descriptor, err.descriptor):
            err = out  # one thread keeps the order of the lines
        else:
            out.other, err.other = err, out
        self._outputs = {"out": out, "err": err}
        self._known: dict[str, int] = {}
        self.repeated = 0
        for output in self._distinct():
            output.start()

    def rank_line(self, line: str, rank: int, host: str, kind: str) -> None:
        """Print a line of a rank on the stream that it came from, "out" or "err"."""
        if not line.strip() and rank > 0:
            return
        if len(self._known) > _MOST_KNOWN:
            self._known.clear()
        first = self._known.setdefault(_NUMBER.sub("#", line), rank)
        if rank == 0:
            self._outputs[kind].put(line)
        elif first == rank:
            self._outputs[kind].put(f"{host}:{rank}: {line}")
        else:
            self.repeated += 1

    def say(self, line: str) -> None:
        """Print a line of the launcher itself, on standard error."""
        self._outputs["err"].put(f"{self._command}: {line}")

    def show(self, line: str) -> None:
        """Print a line of the launcher itself, on standard output."""
        self._outputs["out"].put(line)

    def close(self, seconds: float = 5.0) -> None:
        """Print what waits, and end; an output is given up of which nobody has taken anything for some seconds.

        What the program prints afterwards to such an output is dropped too, since it would wait without limit.
        """
        for output in self._distinct():
            output.end(seconds)
        for descriptor in self._descriptors:
            if not _has_room(descriptor, seconds):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)

    def _distinct(self) -> list["_Output"]:
        return list(dict.fromkeys(self._outputs.values()))


class _Output:
    """A descriptor, and the thread that writes lines to it, piece by piece as there is room.

    other: the output that is told where this one cannot be written.
    """

    def __init__(self, name: str, stream: TextIO) -> None:
        stream.flush()  # what was printed before stands before the lines
        self.descriptor = stream.fileno()
        self.other: _Output | None = None
        self._name, self._encoding = name, stream.encoding
        self._waiting: deque[str] = deque(maxlen=_MOST_WAITING)
        self._dropped = 0  # lines
        self._is_left = False  # since it cannot be written
        self._taken = 0  # bytes so far
        self._came, self._ends, self._gives_up = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._write_all, daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def put(self, line: str) -> None:
        """Let a line wait for its turn; of too many that wait the oldest is dropped."""
        if not self._is_left:
            self._dropped += len(self._waiting) == _MOST_WAITING
            self._waiting.append(line)
            self._came.set()

    def end(self, seconds: float) -> None:
        """Write what waits, and end; give up where nothing is taken for some seconds."""
        self._ends.set()
        self._came.set()
        taken, since = -1, time.monotonic()
        while self._thread.is_alive() and time.monotonic() - since < seconds:
            if self._taken != taken:
                taken, since = self._taken, time.monotonic()
            self._thread.join(_LOOK)
        self._gives_up.set()

    def _write_all(self) -> None:
        try:
            while not (self._ends.is_set() and not self._waiting):
                self._came.wait()
                self._came.clear()
                while self._waiting and not self._gives_up.is_set():
                    line = self._waiting.popleft()
                    if self._dropped:
                        dropped, self._dropped = counted(self._dropped, "line"), 0
                        self._write(f"warning: {dropped} left out, which nobody took; {_SEE_FILES}\n")
                    self._write(f"{line}\n")
                if self._gives_up.is_set():
                    return
        except OSError as error:
            self._is_left = True
            self._waiting.clear()
            if self.other is not None:
                reason = error.strerror or error
                self.other.put(f"warning: {self._name}: {reason}; the run goes on without it")

    def _write(self, text: str) -> None:
        """Write a text, as far as its reader takes it before this output is given up."""
        data = text.encode(self._encoding, "backslashreplace")
        while data and not self._gives_up.is_set():
            if _has_room(self.descriptor, _LOOK):
                try:
                    written = os.write(self.descriptor, data[:_PIECE])
                except BlockingIOError:  # of a terminal or a socket with room for less than a piece, that does not wait
                    time.sleep(_LOOK / 10)
                    continue
                data, self._taken = data[written:], self._taken + written


def _has_room(descriptor: int, wait: float = 0.0) -> bool:
    """Whether there is room for a piece within some seconds; an output that cannot be written has room."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(wait * 1000))
