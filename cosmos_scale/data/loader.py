"""Batches for training: the data order, cut over ranks, read and turned into views and token ids by worker processes.

The global batch of step s is one stretch of the order, and each rank's share a contiguous part of it. So the shares of
all ranks, one after the other, are the same batch at any world size, and nothing here depends on the number of workers.
"""

import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cosmos_scale.batch import Batch, caption_lengths
from cosmos_scale.config import RunConfig
from cosmos_scale.data.captions import draw_captions
from cosmos_scale.data.decode import Views
from cosmos_scale.data.decode.picture import decode_rgbx
from cosmos_scale.data.decode.torch_cpu import execute
from cosmos_scale.data.index import MergedIndex
from cosmos_scale.data.order import steps_per_epoch
from cosmos_scale.data.plan import plan_views
from cosmos_scale.data.sample import DamagedSample, SampleKey
from cosmos_scale.data.shards import Location, ShardReader
from cosmos_scale.errors import UserError

Tokenize = Callable[[Sequence[str]], Tensor]

MOST_WORKERS = 8  # by default: what lies above is the user's choice
# A damaged sample's substitute may be damaged too. So many in a row are no accident.
MOST_SUBSTITUTES = 20
# The share of damaged samples is taken of at least so many: one damaged picture in the first batch proves nothing.
FEWEST_JUDGED = 1000


class Damage(NamedTuple):
    """One damaged sample, as it is written to damaged.jsonl."""

    step: int
    epoch: int
    sample: int
    source: str
    shard: str
    key: str
    reason: str


class _Loaded(NamedTuple):
    """What comes out of a worker: a batch, or the text of the UserError that prevented it."""

    batch: Batch | None
    damages: list[Damage]
    error: str | None


class TrainLoader:
    """The training batches of one rank.

    tokenizer: texts to [N, L] int32 ids. damaged_log: file that damaged samples are appended to, by all ranks; what
    it holds already, as after a resume, is not appended again.
    Raises: UserError where the world size does not divide the batch or an epoch holds no batch.
    """

    def __init__(
        self,
        config: RunConfig,
        index: MergedIndex,
        tokenizer: Tokenize,
        rank: int,
        world_size: int,
        damaged_log: Path | None = None,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(
            index.epoch_samples, config.train.global_batch, config.data.last_batch, config.train.epoch_steps_multiple
        )
        self._config = config
        self._rank = rank
        self._damaged_log = damaged_log
        self._workers = default_workers(world_size) if config.data.workers is None else config.data.workers
        self._dataset = _Steps(config, index, tokenizer, rank, config.micro_batch(world_size), self.steps_per_epoch)
        self._tried = 0
        self._damaged = 0

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Yield this rank's batch of step `start_step` and of every step after it, without end.

        Tensors are on the CPU, pinned where CUDA is available.
        Raises: UserError where a shard or its index is missing or stale, where more than data.max_damaged of the
        samples are damaged, or where a worker process dies; the caller adds which rank it is.
        """
        workers = self._workers
        listed = set() if self._damaged_log is None else _listed(self._damaged_log, start_step)
        loader: DataLoader[_Loaded] = DataLoader(
            self._dataset,
            sampler=_StepsFrom(start_step),
            batch_size=None,
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=self._config.data.prefetch if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            # Forked workers share the index's pages and start at once; they touch neither CUDA nor the process group.
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),  # its own: torch's global generator stays as it was
        )
        results = _without_child_signals(loader)
        while True:
            try:
                loaded = next(results)
            except (RuntimeError, EOFError, OSError) as error:
                # The last two: a batch was ready, but who held its memory is gone.
                if workers == 0 or (isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)):
                    raise
                cause = str(error).partition("\n")[0].strip(" .") or type(error).__name__
                raise UserError(
                    f"a loader process died ({cause}); if memory ran out, "
                    f"lower data.workers ({workers}) or data.prefetch"
                ) from error
            self._log([damage for damage in loaded.damages if damage not in listed])
            if loaded.batch is None:
                raise UserError(loaded.error)
            self._judge(loaded.damages)
            yield loaded.batch

    def _log(self, damages: list[Damage]) -> None:
        if not damages or self._damaged_log is None:
            return
        lines = [json.dumps({**damage._asdict(), "rank": self._rank}) + "\n" for damage in damages]
        self._damaged_log.parent.mkdir(parents=True, exist_ok=True)
        # One write: ranks that append at the same time do not cut each other's lines.
        with self._damaged_log.open("ab", buffering=0) as log:
            log.write("".join(lines).encode())

    def _judge(self, damages: list[Damage]) -> None:
        """Count samples, substitutes included; raise UserError where too many of them are damaged."""
        self._tried += self._dataset.micro_batch + len(damages)
        self._damaged += len(damages)
        limit = self._config.data.max_damaged
        if damages and self._damaged > limit * max(self._tried, FEWEST_JUDGED):
            last = damages[-1]
            raise UserError(
                f"{self._damaged} of {self._tried} samples are damaged, more than data.max_damaged "
                f"{limit:g} allows; the last is {last.key} in {last.shard}: {last.reason}"
                + (f"; all are in {self._damaged_log}" if self._damaged_log else "")
            )


def _listed(log: Path, start_step: int) -> set[Damage]:
    """The damage from a step on that a log names already: a resumed run comes upon it again.

    Left out when it comes again, rather than deleted now: other ranks may be appending by now.
    """
    listed: set[Damage] = set()
    if log.exists():
        for line in log.read_bytes().splitlines():
            try:
                record = json.loads(line)
                damage = Damage(*(record[field] for field in Damage._fields))
                if damage.step >= start_step:
                    listed.add(damage)
            except (ValueError, KeyError, TypeError):
                continue  # a torn line
    return listed


def default_workers(world_size: int) -> int:
    """Return the loader processes of each rank where the config leaves them open: this host's cores shared out."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
    return max(0, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // ranks_here - 1))


class _Steps(Dataset[_Loaded]):
    """Maps a step of the run to this rank's batch of it."""

    def __init__(
        self, config: RunConfig, index: MergedIndex, tokenizer: Tokenize, rank: int, micro_batch: int, steps: int
    ) -> None:
        self.micro_batch = micro_batch
        self._config = config
        self._index = index
        self._tokenizer = tokenizer
        self._rank = rank
        self._steps_per_epoch = steps
        self._order = index.order(config.seed, config.data.window)
        self._reader = ShardReader()

    def __getitem__(self, step: int) -> _Loaded:
        damages: list[Damage] = []
        try:
            return _Loaded(self._batch(step, damages), damages, None)
        except UserError as error:  # as a value: an exception would reach the training process as a traceback's text
            return _Loaded(None, damages, str(error))

    def _batch(self, step: int, damages: list[Damage]) -> Batch:
        config, size = self._config, self.micro_batch
        views, side = config.data.views, config.model.vision.image_size
        epoch, epoch_step = divmod(step, self._steps_per_epoch)
        first = epoch_step * config.train.global_batch + self._rank * size
        positions = np.arange(first, first + size)
        visits = self._order.visits(epoch, positions)
        samples = visits.samples.tolist()

        global_crops = torch.empty(views.global_crops, size, 3, side, side)
        local_crops = torch.empty(views.local_crops, size, 3, views.local_size, views.local_size)
        texts: list[list[str]] = []
        substituted = 0
        for b, position in enumerate(positions.tolist()):
            wanted = samples[b]
            key = SampleKey(config.seed, epoch, wanted, int(visits.repeats[b]))
            samples[b], made, captions = self._sample(step, position, key, damages)
            substituted += samples[b] != wanted
            global_crops[:, b] = made.global_crops
            local_crops[:, b] = made.local_crops
            texts.append(captions)
        # Captions first, samples second: [K, B, L].
        ids_NL = self._tokenizer([captions[k] for k in range(config.data.captions.count) for captions in texts])
        ids_KBL = ids_NL.view(config.data.captions.count, size, -1)
        return Batch(
            global_crops,
            local_crops,
            ids_KBL,
            caption_lengths(ids_KBL),
            torch.tensor(samples),
            torch.tensor(substituted),
        )

    def _sample(self, step: int, position: int, key: SampleKey, damages: list[Damage]) -> tuple[int, Views, list[str]]:
        """Make one sample, or where it is damaged its first sound substitute: (its id, views, captions)."""
        for attempt in range(MOST_SUBSTITUTES + 1):
            location = self._index.locate(key.sample)
            try:
                return key.sample, *self._make(key, location)
            except DamagedSample as damage:
                place = (location.source, str(location.shard), location.entry.key)
                damages.append(Damage(step, key.epoch, key.sample, *place, str(damage)))
            key = key._replace(sample=self._order.substitute(key.epoch, position, attempt))
        last = damages[-1]
        raise UserError(
            f"{MOST_SUBSTITUTES + 1} damaged samples in a row; the last is {last.key} in {last.shard}: {last.reason}"
        )

    def _make(self, key: SampleKey, location: Location) -> tuple[Views, list[str]]:
        data = self._config.data
        image_bytes, document = self._reader.read(location)
        captions = draw_captions(data.captions, document, key)
        side = self._config.model.vision.image_size
        picture = decode_rgbx(image_bytes, data.max_pixels)
        views = Views.empty(data.views, side)
        execute(picture, plan_views(data.views, side, key, *picture.shape[:2]), *views)
        return views, captions


class _StepsFrom(Sampler[int]):
    """All steps of a run from one on."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._start)


def _without_child_signals(loader: "DataLoader[_Loaded]") -> Iterator[_Loaded]:
    """Start a loader's workers, and leave SIGCHLD as it was.

    torch's handler raises a dead worker's error wherever the training process happens to be, be it in a collective.
    Without it the death is noticed, within seconds, where a batch is asked for.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    results = iter(loader)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
    return results


def _as_is(loaded: Any) -> Any:
    return loaded


def _start_worker(worker: int) -> None:
    # Ctrl-C, schedulers and launchers signal all processes; the training process decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_parent_says, daemon=True).start()


def _end_when_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
