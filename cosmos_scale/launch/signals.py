"""The signals that ask a launch to stop: the first one lets the ranks save, a second Ctrl-C ends them at once."""

import os
import signal
import time
from contextlib import suppress
from types import FrameType
from typing import Any

ASK = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
_ONE_WISH = 1.0  # seconds: programs that wrap this one pass on the Ctrl-C that the terminal sends to all


class StoppedEarly(Exception):
    """A signal has come before any rank was started."""


class StopSignals:
    """A context inside which the signals that end programs only ask to stop; one that is ignored stays so.

    first: the name of the first signal, None before it. at_once: whether a second SIGINT has come.
    """

    def __init__(self) -> None:
        self.first: str | None = None
        self.at_once = False
        self._when = 0.0
        self._handlers: dict[int, Any] = {}
        self.wakes, self._writes = os.pipe()  # the first can be waited for: a signal makes it readable

    def __enter__(self) -> "StopSignals":
        for descriptor in (self.wakes, self._writes):
            os.set_blocking(descriptor, False)
        for number in ASK:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self.wakes)
        os.close(self._writes)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self._when = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._when > _ONE_WISH:
            self.at_once = True
        with suppress(BlockingIOError):  # enough wake-ups wait
            os.write(self._writes, b"!")
