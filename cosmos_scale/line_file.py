"""A file that lines are appended to while a run works, whose failures end nothing."""

import errno
import logging
import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cosmos_scale.files import read_regular, regular_only, whole_file

MOST_KEPT = 100_000  # lines, while they cannot be written

_LOG = logging.getLogger(__name__)


class LineFile:
    """A file to append lines to, whose failures end nothing: lines wait in memory until they can be written.

    A failure is told once, and so is its end. A file that is deleted or emptied meanwhile is told of too, and begun
    anew. Several processes may append to one file.
    """

    def __init__(self, path: Path, *, alone: bool = False) -> None:
        """alone: no other process appends to the file, so that it can be copied where it has got a further name."""
        self.path = path
        self._alone = alone
        self._waiting: deque[bytes] = deque()
        self._dropped = 0
        self._failing = False
        self._begun = False  # the file has lines of this object
        self._torn = False  # the file ends in a part of a line, which cannot be taken back

    def append(self, lines: Sequence[str]) -> None:
        """Write lines, without their ends, after those that wait; of too many that wait the oldest are dropped."""
        self._waiting += (line.encode() + b"\n" for line in lines)
        try:
            self._write()
        except OSError as error:
            while len(self._waiting) > MOST_KEPT:
                self._waiting.popleft()
                self._dropped += 1
            if not self._failing:
                self._failing = True
                reason = error.strerror or str(error)
                _LOG.warning(
                    "%s: cannot be written: %s; its lines are kept until it can, work goes on", self.path, reason
                )
            return
        if self._failing:
            lost = f"; lines lost: {self._dropped:,}" if self._dropped else ""
            _LOG.warning("%s: is written again%s", self.path, lost)
            self._failing, self._dropped = False, 0

    def close(self) -> None:
        """Try the lines that wait a last time."""
        if self._waiting:
            self.append([])
        if count := len(self._waiting) + self._dropped:
            _LOG.warning("%s: cannot be written still; lines lost: %s", self.path, count)

    def _write(self) -> None:
        """Write all lines that wait, in one write, so that processes do not cut each other's lines; raises OSError."""
        if not self._waiting:
            return
        data = b"\n" * self._torn + b"".join(self._waiting)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._alone:
            self._leave_other_names()
        # Opened each time: a handle may be of a file that is gone, or of a server that has restarted.
        with open(self.path, "ab", buffering=0, opener=regular_only) as file:
            before = os.fstat(file.fileno()).st_size
            if before == 0 and self._begun:
                self._begun = self._torn = False
                _LOG.warning(
                    "%s: was deleted or emptied, with the lines before; those from now on are written", self.path
                )
            try:
                written = file.write(data)
                if written < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self._take_back(file.fileno(), before, len(data))
                raise
        self._waiting.clear()
        self._begun, self._torn = True, False

    def _leave_other_names(self) -> None:
        """Copy a file with a further name, as `cp -al` of its folder gives it: that one stays as it is."""
        with suppress(FileNotFoundError):
            if os.stat(self.path).st_nlink > 1:
                with whole_file(self.path.resolve()) as part:
                    part.write_bytes(read_regular(self.path))

    def _take_back(self, file: int, before: int, most: int) -> None:
        """Cut off the part of the lines that was written, unless another process has appended since."""
        with suppress(OSError):
            added = os.fstat(file).st_size - before
            torn, self._torn = self._torn, self._torn or added > 0
            if 0 < added < most:
                os.ftruncate(file, before)
                self._torn = torn
