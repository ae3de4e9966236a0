"""Messages between the launcher and the programs that it starts on hosts: lines of JSON over pipes, without waiting.

Other lines may come between the messages, such as greetings of a login shell; a mark tells them apart.
"""

import json
import os
from typing import Any

Message = dict[str, Any]

_MARK = b"@cosmos-scale "
_PIECE = 1 << 16  # bytes read at once
_LONGEST_MESSAGE = 1 << 26  # bytes
_MOST_WAITING = 1 << 22  # bytes that wait to be written, beyond which lines of output are dropped


class Inbox:
    """The reading end of a pipe: whole lines, as they come. longest: bytes of a line, after which it is cut."""

    def __init__(self, descriptor: int, longest: int = _LONGEST_MESSAGE) -> None:
        self.descriptor = descriptor
        self.closed = False
        self._rest = b""
        self._longest = longest
        os.set_blocking(descriptor, False)

    def fileno(self) -> int:
        """Return the descriptor, for selectors."""
        return self.descriptor

    def lines(self) -> list[str]:
        """Return the lines that have come, without their ends; at the pipe's end also the last one's beginning."""
        whole, data = [], self._read()
        while data:
            *ended, self._rest = (self._rest + data).split(b"\n")
            if len(self._rest) > self._longest:
                ended, self._rest = [*ended, self._rest], b""
            whole += ended
            data = self._read()
        if self.closed and self._rest:
            whole.append(self._rest)
            self._rest = b""
        return [line[: self._longest].decode(errors="replace").rstrip("\r") for line in whole]

    def messages(self) -> tuple[list[Message], list[str]]:
        """Return the messages that have come, and the other lines, also one without an end right before a message."""
        messages, others, mark = [], [], _MARK.decode()
        for line in self.lines():
            other, found, message = line.partition(mark)
            if found:
                messages.append(json.loads(message))
            if other or not found:
                others.append(other)
        return messages, others

    def _read(self) -> bytes:
        if self.closed:
            return b""
        try:
            data = os.read(self.descriptor, _PIECE)
        except BlockingIOError:
            return b""
        except OSError:  # of a connection that broke
            data = b""
        self.closed = not data
        return data


class Outbox:
    """The writing end of a pipe: messages wait here until the other side takes them.

    is_held: whether they wait even so. A login shell, which comes before the program, might read them.
    """

    def __init__(self, descriptor: int, *, is_held: bool = False) -> None:
        self.descriptor = descriptor
        self.is_held = is_held
        self.closed = False
        self._waiting = bytearray()
        os.set_blocking(descriptor, False)

    @property
    def is_waiting(self) -> bool:
        """Whether a message waits that may be written."""
        return bool(self._waiting) and not self.closed and not self.is_held

    def send(self, message: Message, *, may_drop: bool = False) -> bool:
        """Send a message, or keep it until it can be sent; returns whether it is not dropped.

        may_drop: whether the message may be dropped, where too much waits.
        """
        if self.closed or (may_drop and len(self._waiting) > _MOST_WAITING):
            return False
        self._waiting += _MARK + json.dumps(message).encode() + b"\n"
        self.flush()
        return True

    def flush(self) -> None:
        """Write what waits, as far as the other side takes it now."""
        while self.is_waiting:
            try:
                del self._waiting[: os.write(self.descriptor, self._waiting)]
            except BlockingIOError:
                return
            except OSError:  # nobody reads any more
                self.closed = True
