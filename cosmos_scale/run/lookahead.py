"""The batches of a run, fetched while the device works, and what all ranks agree on before each of their steps."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import NamedTuple, Protocol

from cosmos_scale.batch import Batch
from cosmos_scale.engine.ranks import Ranks, from_all, maxima, raise_together
from cosmos_scale.errors import JointError, ShardsToGiveUp, UserError
from cosmos_scale.phases import phase
from cosmos_scale.run.copy_stream import CopyStream
from cosmos_scale.run.stop_request import StopRequest, encode_reason, name_reason


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
        enter: Callable[[str], object],
    ) -> None:
        """first: steps done. last: steps done at the end. say: is told of lost shards. unsaved: asked at each step.

        enter: is told what this rank begins to do.
        """
        self._loader = loader
        self._ranks = ranks
        self._copies = CopyStream(ranks.device)
        self._stop = stop
        self._say = say
        self._unsaved = unsaved
        self._enter = enter
        self._step, self._last = first, last
        self.failure: JointError | None = None  # why there is no batch any more
        self.stopped_by: str | None = None  # what asked to stop, and at which rank; the same on all ranks
        # Kept to the end, so that loader processes are shut down after the last checkpoint: that may take long.
        self._batches = loader.batches(first)

    def __iter__(self) -> "Lookahead":
        return self

    def __next__(self) -> Fetched:
        """End on every rank where any rank has no batch, or more data is lost than the run allows: see `failure`."""
        waited = 0.0
        while self._step < self._last:
            next_step = f"step {self._step + 1}"
            self._enter(f"its wait for the batch of {next_step}")
            start = time.perf_counter()
            batch, lost, error = self._fetch()
            waited += time.perf_counter() - start
            self._enter(f"its wait for the other ranks before {next_step}")
            stop_here = encode_reason(self._stop.reason, self._ranks.rank, self._ranks.world_size)
            here = [error is not None, stop_here, bool(lost), self._unsaved()]
            with phase("ranks"):
                failed, stop, any_lost, unsaved = maxima(here, self._ranks)
            try:
                if failed:
                    raise_together(self._ranks, error)
                if any_lost and not stop:
                    self._give_up(lost)
                    continue
            except JointError as failure:
                self.failure = failure
            if stop:
                self.stopped_by = name_reason(int(stop), self._ranks.world_size)
            if stop or self.failure is not None:
                self._last = self._step  # no batch comes any more
                break
            assert batch is not None
            self._step += 1
            self._enter(next_step)
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
            with phase("data"):
                batch = next(self._batches)
            with phase("copy"):
                return self._copies.bring(batch), {}, None
        except ShardsToGiveUp as loss:
            return None, loss.shards, None
        except UserError as error:
            return None, {}, error
