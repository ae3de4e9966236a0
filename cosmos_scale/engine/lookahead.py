"""The next batch, fetched ahead, and what all ranks agree on before they use it: does everyone have one, who stops."""

import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from cosmos_scale.batch import Batch
from cosmos_scale.engine.collectives import PendingMaxima, Ranks, raise_together
from cosmos_scale.errors import UserError


class StopRequest:
    """Why this process wants the run to stop at the next step boundary: a signal or the time limit.

    A context: inside it SIGTERM and SIGINT only ask to stop; another SIGINT, over a second later, interrupts at once.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self._deadline = None if max_minutes is None else time.monotonic() + 60.0 * max_minutes
        self._signalled: float | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled is None:
            self._signalled = now
        # Programs that wrap this one pass on the Ctrl-C that a terminal sends to all: two at once are one wish.
        elif number == signal.SIGINT and now - self._signalled > 1.0:
            raise KeyboardInterrupt

    @property
    def wanted(self) -> bool:
        """Whether this process wants to stop."""
        return self._signalled is not None or (self._deadline is not None and time.monotonic() > self._deadline)


class Lookahead:
    """Fetches a batch while the device works on the step before, and exchanges one small message about it.

    A rank that cannot get its batch would leave the others waiting in the next collective; so every rank hears of it
    before any of them starts that step, and all end with that rank's message.
    """

    def __init__(self, batches: Iterator[Batch], ranks: Ranks, stop: StopRequest) -> None:
        self._batches = batches
        self._ranks = ranks
        self._stop = stop
        self._batch: Batch | None = None
        self._error: UserError | None = None
        self._agreement: PendingMaxima | None = None
        self._wait_seconds = 0.0

    def fetch(self) -> None:
        """Get this rank's next batch and start telling the others."""
        start = time.perf_counter()
        self._batch, self._error = None, None
        try:
            self._batch = next(self._batches).to(self._ranks.device)
        except UserError as error:
            self._error = error
        self._wait_seconds += time.perf_counter() - start
        self._agreement = PendingMaxima(self._ranks, [self._error is not None, self._stop.wanted])

    def waited(self) -> float:
        """Seconds spent on waiting for batches since this was last asked."""
        seconds, self._wait_seconds = self._wait_seconds, 0.0
        return seconds

    def take(self) -> tuple[Batch, bool]:
        """The batch fetched last, and whether any rank wants to stop before using it.

        Raises UserError on every rank where any rank has no batch.
        """
        assert self._agreement is not None
        failed, stop = self._agreement.wait()
        if failed:
            raise_together(self._ranks, self._error)
        assert self._batch is not None
        return self._batch, bool(stop)
