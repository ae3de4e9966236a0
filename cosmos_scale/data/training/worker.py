"""What a loader process does: the steps' batches of one rank, made from shards into shared memory.

Failures come back as values: an exception would reach the training process only as the text of a traceback.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cosmos_scale.batch import caption_lengths
from cosmos_scale.config import RunConfig
from cosmos_scale.data.decode.blocks import TensorBlock
from cosmos_scale.data.decode.pictures import start_pictures
from cosmos_scale.data.forked import leave_parents_garbage
from cosmos_scale.data.samples.captions import draw_captions
from cosmos_scale.data.samples.origin import describe_origin
from cosmos_scale.data.samples.sample import DamagedSample, SampleKey, UnreachableShard
from cosmos_scale.data.shards.index import MergedIndex
from cosmos_scale.data.shards.reader import Location, ShardReader
from cosmos_scale.data.training.damage import Damage
from cosmos_scale.data.training.lost import LostShards
from cosmos_scale.data.training.order import EpochOrder
from cosmos_scale.errors import ShardsToGiveUp, UserError
from cosmos_scale.phases import phase, stop_listening

Tokenize = Callable[[Sequence[str]], Tensor]
PutPicture = Callable[[bytes, SampleKey], None]
ShowError = Callable[[type[BaseException], BaseException, TracebackType | None], object]

# A damaged sample's substitute may be damaged too. So many damaged samples in a row are no accident.
MOST_SUBSTITUTES = 20
# A lost shard may fill its window of the order: after so many tries substitutes come from another window.
SUBSTITUTES_A_WINDOW = 4


@dataclass(frozen=True)
class Loaded:
    """What a worker makes for one step: the tensors of a batch, or else the lost shards or the error that prevented it.

    block: the views, or what the decoder needs to make them, then the other fields of Batch. lost: reasons by the
    shards' names. error: the text of a UserError.
    """

    block: TensorBlock | None = None
    damages: list[Damage] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    def pin_memory(self) -> "Loaded":
        """Copy the block into pinned memory; torch's loader calls this where there is a GPU."""
        return self if self.block is None else replace(self, block=self.block.pin_memory())


class StepBatches(Dataset[Loaded]):
    """Maps a step of the run to one rank's batch of it."""

    def __init__(
        self,
        config: RunConfig,
        index: MergedIndex,
        tokenizer: Tokenize,
        lost: LostShards,
        *,
        rank: int,
        samples_per_rank: int,
        steps_per_epoch: int,
        shared: bool,
    ) -> None:
        """lost: the shards given up when a worker starts. shared: whether batches leave the process that makes them."""
        self._config = config
        self._index = index
        self._tokenizer = tokenizer
        self._lost = lost
        self._rank = rank
        self._samples_per_rank = samples_per_rank
        self._steps_per_epoch = steps_per_epoch
        self._shared = shared
        self._order = EpochOrder(index.source_shards(), config.seed, config.data.window)
        self._reader = ShardReader(config.data.remote)

    def __getitem__(self, step: int) -> Loaded:
        damages: list[Damage] = []
        try:
            return Loaded(self._batch(step, damages), damages)
        except ShardsToGiveUp as loss:
            return Loaded(damages=damages, lost=loss.shards)
        except UserError as error:
            return Loaded(damages=damages, error=str(error))

    def _batch(self, step: int, damages: list[Damage]) -> TensorBlock:
        config, B, K = self._config, self._samples_per_rank, self._config.data.captions.count
        epoch, epoch_step = divmod(step, self._steps_per_epoch)
        first = epoch_step * config.train.global_batch + self._rank * B
        positions = np.arange(first, first + B)
        visits = self._order.visits(epoch, positions)

        pictures = start_pictures(config, B, shared=self._shared)
        samples: list[int] = []
        texts: list[list[str]] = []
        for b, position in enumerate(positions.tolist()):
            key = SampleKey(config.seed, epoch, int(visits.samples[b]), int(visits.repeats[b]))
            sample, captions = self._sample(step, position, key, partial(pictures.put, b), damages)
            samples.append(sample)
            texts.append(captions)
        # Captions first, samples second: [K, B, L].
        with phase("tokens"):
            ids_KBL = self._tokenizer([captions[k] for k in range(K) for captions in texts]).view(K, B, -1)
        sample_ids = torch.tensor(samples)
        substituted = (sample_ids != torch.from_numpy(visits.samples)).sum()
        return pictures.block([ids_KBL, caption_lengths(ids_KBL), sample_ids, substituted])

    def _sample(
        self, step: int, position: int, key: SampleKey, put: PutPicture, damages: list[Damage]
    ) -> tuple[int, list[str]]:
        """Put in one sample, or its first sound substitute where it cannot be used; returns (id, captions).

        Raises: ShardsToGiveUp where a shard that was not given up cannot be read any more.
        """
        known = len(damages)
        for attempt in range(MOST_SUBSTITUTES + 1):
            if not self._lost.holds(key.sample, step):
                try:
                    location = self._index.locate(key.sample)
                    return key.sample, self._make(key, location, put)
                except DamagedSample as damage:
                    place = (location.source, str(location.shard), location.entry.key)
                    damages.append(Damage(step, key.epoch, key.sample, *place, str(damage), damage.origin))
                except UnreachableShard as loss:
                    raise ShardsToGiveUp({self._lost.shard_of(key.sample): loss.reason}) from loss
            windows_on = 2 ** (attempt // SUBSTITUTES_A_WINDOW) - 1
            beside = position + windows_on * self._config.data.window
            key = key._replace(sample=self._order.substitute(key.epoch, beside, attempt))
        if len(damages) == known:
            raise UserError(
                f"{MOST_SUBSTITUTES + 1} substitutes in a row lie in lost shards; "
                "rule: lower data.max_damaged, so that training stops before most data is lost"
            )
        last = damages[-1]
        raise UserError(
            f"{MOST_SUBSTITUTES + 1} damaged samples in a row; the last is {last.key} in {last.shard}: {last.reason}"
        )

    def _make(self, key: SampleKey, location: Location, put: PutPicture) -> list[str]:
        with phase("read"):
            image_bytes, document = self._reader.read(location)
        try:
            with phase("plan"):
                captions = draw_captions(self._config.data.captions, document, key)
            put(image_bytes, key)
        except DamagedSample as damage:
            damage.origin = describe_origin(document)
            raise
        return captions


def start_worker(worker: int) -> None:
    """Make a loader process outlive signals to all processes: the training process alone decides when it ends."""
    leave_parents_garbage()
    stop_listening()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    sys.excepthook = partial(show_unless_left, os.getppid(), sys.excepthook)
    threading.Thread(target=_end_when_parent_says, daemon=True).start()


def show_unless_left(
    parent: int, show: ShowError, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Show an error that only ends a thread, but not where it comes from the training process having been killed.

    Then multiprocessing's thread that hands over shared memory is cut off. parent: the training process's number.
    """
    if not issubclass(kind, (ConnectionError, EOFError)) and os.getppid() == parent:
        show(kind, error, trace)


def _end_when_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
