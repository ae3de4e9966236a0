"""The next batch, fetched ahead, and what all ranks agree on before they use it: does everyone have one, who stops."""

import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol

from cosmos_scale.batch import Batch
from cosmos_scale.engine.ranks import PendingMaxima, Ranks, from_all, raise_together
from cosmos_scale.errors import ShardsToGiveUp, UserError


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


class Loader(Protocol):
    """Where batches come from: what Lookahead needs of `data.loader.TrainLoader`, which says more."""

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        """Yield this rank's batches from a step on; raises ShardsToGiveUp where a batch needs a lost shard."""

    def lose(self, found: Sequence[Mapping[str, str]], step: int) -> list[str]:
        """Give up shards from a step on, and say so; the same on all ranks."""


class Lookahead:
    """Fetches a batch while the device works on the step before, and exchanges one small message about it.

    A rank that cannot get its batch would leave the others waiting in the next collective; so every rank hears of it
    before any of them starts that step, and all end with that rank's message. Where a rank came upon a lost shard, all
    give up this shard from that step on and fetch its batch anew.
    """

    def __init__(
        self, loader: Loader, first_step: int, ranks: Ranks, stop: StopRequest, say: Callable[[str], None]
    ) -> None:
        """first_step: steps done. say: is told of lost shards."""
        self._loader = loader
        self._step = first_step
        self._ranks = ranks
        self._stop = stop
        self._say = say
        self._batches = loader.batches(first_step)
        self._batch: Batch | None = None
        self._lost: Mapping[str, str] = {}
        self._error: UserError | None = None
        self._agreement: PendingMaxima | None = None
        self._wait_seconds = 0.0

    def fetch(self) -> None:
        """Get this rank's next batch and start telling the others."""
        start = time.perf_counter()
        self._batch, self._lost, self._error = None, {}, None
        try:
            self._batch = next(self._batches).to(self._ranks.device)
        except ShardsToGiveUp as loss:
            self._lost = loss.shards
        except UserError as error:
            self._error = error
        self._wait_seconds += time.perf_counter() - start
        self._agreement = PendingMaxima(self._ranks, [self._error is not None, self._stop.wanted, bool(self._lost)])

    def waited(self) -> float:
        """Seconds spent on waiting for batches since this was last asked."""
        seconds, self._wait_seconds = self._wait_seconds, 0.0
        return seconds

    def take(self) -> Batch | None:
        """The batch fetched last; None where any rank wants to stop before using it.

        Raises UserError on every rank where any rank has no batch, or more data is lost than the run allows.
        """
        while True:
            assert self._agreement is not None
            failed, stop, lost = self._agreement.wait()
            if failed:
                raise_together(self._ranks, self._error)
            if stop:
                return None
            if not lost:
                self._step += 1
                return self._batch
            self._give_up()
            self.fetch()

    def _give_up(self) -> None:
        """Give up what any rank found lost, and begin again at the step that needs it; collective."""
        self._batches.close()  # first: its loader processes still know the shards as they were
        for line in self._loader.lose(from_all(self._lost, self._ranks), self._step):
            self._say(line)
        self._batches = self._loader.batches(self._step)
