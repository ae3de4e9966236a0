"""What the ranks print, on the launcher's own output: rank 0's lines as they are, the other ranks' with their place."""

import re
import sys
import threading
from collections import deque

_MOST_WAITING = 10_000  # lines, where nobody takes the output: the ranks' files have all of them
_MOST_KNOWN = 10_000  # lines to compare with
_NUMBER = re.compile(r"\d+")


class Printer:
    """Prints lines from a thread of its own, so that an output which nobody reads holds nothing up.

    A line that ranks repeat, with other numbers in it, is printed for the first of them; the ranks' files have it each.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[str, str]] = deque(maxlen=_MOST_WAITING)
        self._came = threading.Event()
        self._ends = False
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
        self._put("err", f"cosmos-scale launch: {line}")

    def close(self, seconds: float = 5.0) -> None:
        """Print what waits, and end; wait no longer than some seconds for an output that nobody reads."""
        self._ends = True
        self._came.set()
        self._thread.join(seconds)

    def _put(self, kind: str, text: str) -> None:
        self._waiting.append((kind, text))
        self._came.set()

    def _print_all(self) -> None:
        while not (self._ends and not self._waiting):
            self._came.wait()
            self._came.clear()
            while self._waiting:
                kind, text = self._waiting.popleft()
                print(text, file=sys.stderr if kind == "err" else sys.stdout, flush=not self._waiting)
