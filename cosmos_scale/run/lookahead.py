"""The batches of a run, fetched while the device works, and what all ranks agree on before each of their steps."""

import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple, Protocol

from cosmos_scale.batch import Batch
from cosmos_scale.engine.ranks import Ranks, from_all, maxima, raise_together
from cosmos_scale.errors import ShardsToGiveUp, UserError
from cosmos_scale.run.copy_stream import CopyStream


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
    """Where batches come from: what Lookahead needs of `data.training.loader.TrainLoader`, which says more."""

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        """Yield this rank's batches from a step on; raises ShardsToGiveUp at a batch that needs a lost shard."""

    def lose(self, found: Sequence[Mapping[str, str]], step: int) -> list[str]:
        """Give up shards from a step on, and say so; the same on all ranks."""


class Fetched(NamedTuple):
    """A batch on the device, of a step that all ranks take.

    wait_seconds: how long this rank waited for its batch. unsaved: whether any rank says that it could not save; the
    same on all ranks.
    """

    batch: Batch
    wait_seconds: float
    unsaved: bool


class Lookahead:
    """Yields a batch for each step up to the last, or up to the step before which any rank wants to stop.

    The loop's next turn fetches the next batch: the device still works on the step that was launched before. A rank
    that cannot get its batch would leave the others waiting in the next collective. So all ranks exchange one small
    message about each batch before any of them starts its step. Where one rank failed, the batches end on all ranks,
    and `failure` holds that rank's message: the steps done can be saved first. Where a rank came upon a lost shard, all
    give up this shard from that step on and fetch its batch anew.
    """

    def __init__(
        self,
        loader: Loader,
        ranks: Ranks,
        stop: StopRequest,
        say: Callable[[str], None],
        *,
        first: int,
        last: int,
        unsaved: Callable[[], bool],
    ) -> None:
        """first: steps done. last: steps done at the end. say: is told of lost shards. unsaved: asked at each step."""
        self._loader = loader
        self._ranks = ranks
        self._copies = CopyStream(ranks.device)
        self._stop = stop
        self._say = say
        self._unsaved = unsaved
        self._step, self._last = first, last
        self.failure: UserError | None = None  # why there is no batch any more, the same on all ranks
        # Kept to the end, so that loader processes are shut down after the last checkpoint: that may take long.
        self._batches = loader.batches(first)

    def __iter__(self) -> "Lookahead":
        return self

    def __next__(self) -> Fetched:
        """End on every rank where any rank has no batch, or more data is lost than the run allows: see `failure`."""
        waited = 0.0
        while self._step < self._last:
            start = time.perf_counter()
            batch, lost, error = self._fetch()
            waited += time.perf_counter() - start
            here = [error is not None, self._stop.wanted, bool(lost), self._unsaved()]
            failed, stop, any_lost, unsaved = maxima(here, self._ranks)
            try:
                if failed:
                    raise_together(self._ranks, error)
                if any_lost and not stop:
                    self._give_up(lost)
                    continue
            except UserError as failure:
                self.failure = failure
            if stop or self.failure is not None:
                self._last = self._step  # no batch comes any more
                break
            assert batch is not None
            self._step += 1
            return Fetched(batch, waited, bool(unsaved))
        raise StopIteration

    def _give_up(self, lost: Mapping[str, str]) -> None:
        """Give up what any rank found lost, and begin again at the step that needs it; collective."""
        self._batches.close()  # first: its loader processes still know the shards as they were
        for line in self._loader.lose(from_all(lost, self._ranks), self._step):
            self._say(line)
        self._batches = self._loader.batches(self._step)

    def _fetch(self) -> tuple[Batch | None, Mapping[str, str], UserError | None]:
        """This rank's next batch; or the shards that it found lost, or what prevents it."""
        try:
            return self._copies.bring(next(self._batches)), {}, None
        except ShardsToGiveUp as loss:
            return None, loss.shards, None
        except UserError as error:
            return None, {}, error
