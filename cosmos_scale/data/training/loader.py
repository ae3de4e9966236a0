"""Batches for training: the data order, cut over ranks, read and turned into views and token ids by worker processes.

The global batch of step s is one stretch of the order, and each rank's share is a contiguous part of the stretch. So
the shares of all ranks, one after the other, are the same batch at any world size. Nothing depends on the number of
workers.
"""

import itertools
import signal
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from cosmos_scale.batch import Batch
from cosmos_scale.config import RunConfig
from cosmos_scale.data.decode.blocks import block_bytes
from cosmos_scale.data.decode.dali import DaliDecoder, Encoded, require_dali
from cosmos_scale.data.decode.pictures import batch_fields
from cosmos_scale.data.forked import no_collection
from cosmos_scale.data.shards.index import MergedIndex
from cosmos_scale.data.training.damage import Damage, DamageCount, DamageLog
from cosmos_scale.data.training.lost import LostShards
from cosmos_scale.data.training.order import steps_per_epoch
from cosmos_scale.data.training.room import ReadyBatches
from cosmos_scale.data.training.worker import Loaded, StepBatches, Tokenize, start_worker
from cosmos_scale.errors import JointError, ShardsToGiveUp, UserError
from cosmos_scale.files import TOO_MANY_OPEN_FILES
from cosmos_scale.host import ranks_of_this_host, usable_cores, uses_gpu
from cosmos_scale.words import counted

MOST_WORKERS = 8  # by default; the config may say more
CPU = torch.device("cpu")
ENCODED = len(Encoded._fields)


class TrainLoader:
    """The training batches of one rank.

    tokenizer: texts to [N, L] int32 ids. damaged_log: the file to which all ranks append damaged samples and lost
    shards. lost_shards: the shards that the run has given up so far, each with the step from which on its samples are
    replaced. device: where `decoder: dali` decodes.
    Raises: UserError where the world size does not divide the batch, an epoch holds no batch, or DALI is missing.
    """

    def __init__(
        self,
        config: RunConfig,
        index: MergedIndex,
        tokenizer: Tokenize,
        rank: int,
        world_size: int,
        damaged_log: Path | None = None,
        lost_shards: Mapping[str, int] | None = None,
        device: torch.device = CPU,
    ) -> None:
        check_loading(config, index, world_size)
        self.steps_per_epoch = steps_per_epoch(index.epoch_samples, config)
        self._config = config
        self._rank = rank
        self._device = device
        self._decoder: DaliDecoder | None = None
        self._ready = ready_batches(config, world_size, device)
        self._workers = self._ready.workers
        self._samples_per_rank = config.samples_per_rank(world_size)
        self._lost = LostShards(index, lost_shards or {})
        self._dataset = StepBatches(
            config,
            index,
            tokenizer,
            self._lost,
            rank=rank,
            samples_per_rank=self._samples_per_rank,
            steps_per_epoch=self.steps_per_epoch,
            shared=self._workers > 0,
        )
        self._log = None if damaged_log is None else DamageLog(damaged_log, rank)
        self._unlogged: list[Damage] = []
        self._count = DamageCount(config.data.max_damaged, damaged_log)

    @property
    def lost_shards(self) -> dict[str, int]:
        """The shards given up so far, each with the step from which on its samples are replaced."""
        return dict(self._lost.steps)

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        """Yield this rank's batch of step `start_step` and of every step after it, without end.

        Tensors are on the CPU, pinned where CUDA is available; crops made by DALI are on its device.
        Raises: ShardsToGiveUp instead of the batch of a step that needs a shard which cannot be read any more: `lose`
        the shard on all ranks, and begin again at this step. UserError where an index is missing or stale, where more
        than data.max_damaged of the samples are damaged, or where a worker process dies; the caller adds the rank.
        """
        if self._log is not None:
            self._log.start(start_step)
            self._log.append(self._unlogged)
        self._unlogged.clear()
        made = self._tensors(start_step)
        yield from self._decode(made) if self._config.data.decoder == "dali" else (Batch(*tensors) for tensors in made)

    def _tensors(self, start_step: int) -> Iterator[list[Tensor]]:
        """Yield what the workers make of each step; raises what `batches` raises."""
        results = self._start_workers(start_step)
        while True:
            loaded = self._next(results)
            if self._log is not None:
                self._log.append(loaded.damages)
            if loaded.lost:
                raise ShardsToGiveUp(loaded.lost)
            if loaded.block is None:
                raise UserError(loaded.error)
            self._count.add(self._samples_per_rank, loaded.damages, self._lost.share())
            yield loaded.block.tensors()

    def _decode(self, batches: Iterator[list[Tensor]]) -> Iterator[Batch]:
        """Let DALI make the views. DALI works ahead, so an error is raised after the batches before it."""
        failures: list[Exception] = []

        def encoded() -> Iterator[tuple[Encoded, list[Tensor]]]:
            try:
                for tensors in batches:
                    yield Encoded(*tensors[:ENCODED]), tensors[ENCODED:]
            except (ShardsToGiveUp, UserError) as failure:
                failures.append(failure)

        if self._decoder is None:
            views, side = self._config.data.views, self._config.model.vision.image_size
            self._decoder = DaliDecoder(
                *(views, side, self._samples_per_rank, self._device, self._config.data.dali),
                triton=self._config.kernels == "auto",
            )
        for made, others in self._decoder.stream(encoded()):
            yield Batch(*made, *others)
        raise failures[0]

    def make_here(self, step: int) -> Loaded:
        """Make what a worker would make for a step, in this process; for measurements."""
        return self._dataset[step]

    @property
    def workers(self) -> int:
        """How many loader processes this rank has; 0: the training process loads."""
        return self._workers

    def lose(self, found: Sequence[Mapping[str, str]], step: int) -> list[str]:
        """Give up shards from a step on; returns a line on each, for people.

        found: for each rank the shards that it found lost, with reasons by name. All ranks call this with the same.
        Raises: JointError where more is lost than data.max_damaged allows.
        """
        reasons: dict[str, str] = {}
        for rank, shards in enumerate(found):
            for name, reason in shards.items():
                reasons.setdefault(name, f"{reason} (rank {rank})" if len(found) > 1 else reason)
        share, limit = self._lost.share(reasons), self._config.data.max_damaged
        if share > limit:
            # Not given up: the last checkpoint would say so, and the run would never read them again.
            name, number = next(iter(reasons)), len({*self._lost.steps, *reasons})
            raise JointError(
                f"shard {name} is lost: {reasons[name]}; {counted(number, 'lost shard')} "
                f"{'holds' if number == 1 else 'hold'} {share:.2%} of all samples, more than data.max_damaged "
                f"{limit:g} allows"
            )
        self._lost.add(reasons, step)
        if self._rank == 0:
            epoch = step // self.steps_per_epoch
            for name, reason in reasons.items():
                file = self._lost.file(name)
                self._unlogged.append(Damage(step, epoch, None, file.source, file.shown, None, f"lost: {reason}"))
        return [
            f"shard {name} is lost: {reason}; from step {step + 1} on others take the place of its "
            f"{counted(self._lost.samples([name]), 'sample')} ({share:.2%} of all are lost)"
            for name, reason in reasons.items()
        ]

    def _start_workers(self, start_step: int) -> Iterator[Loaded]:
        workers, prefetch = self._workers, self._config.data.prefetch
        self._ready.check_shared_memory()
        loader: DataLoader[Loaded] = DataLoader(
            self._dataset,
            sampler=_StepsFrom(start_step),
            batch_size=None,
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            pin_memory=uses_gpu(self._config.device),
            worker_init_fn=start_worker,
            # Forked workers share the index's pages and start at once. They touch neither CUDA nor the process group.
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),  # of the loader's own, so that torch's global generator stays as it was
        )
        return _without_child_signals(loader)

    def _next(self, results: Iterator[Loaded]) -> Loaded:
        try:
            return next(results)
        except (RuntimeError, EOFError, OSError, MemoryError) as error:
            workers, text = self._workers, str(error)
            if TOO_MANY_OPEN_FILES in text:  # told like what a batch lacks, so that the steps done are saved
                raise UserError(
                    f"loader: {TOO_MANY_OPEN_FILES}; allow more (ulimit -n), or lower data.workers ({workers}) or "
                    "data.prefetch"
                ) from error
            if workers == 0:
                raise
            if text.startswith("Caught"):  # an exception of a worker's code, with its traceback in the text
                cause = text.strip().rpartition("\n")[2]
                if (
                    "memory" not in cause.lower() and "unable to resize file" not in cause
                ):  # beyond `ulimit -f`, or memory full
                    raise
            elif isinstance(error, (RuntimeError, MemoryError)) and "DataLoader worker" not in text:
                raise
            else:  # EOFError, OSError: a batch was ready, but the worker that held its memory is gone
                cause = text.partition("\n")[0].strip(" .") or type(error).__name__
            raise UserError(
                f"a loader process died ({cause}); if memory ran out, lower data.workers ({workers}) or data.prefetch"
            ) from error


def check_loading(config: RunConfig, index: MergedIndex, world_size: int) -> None:
    """Raise UserError where no loader can be made: DALI is missing, or the batch does not fit the ranks or the data."""
    if config.data.decoder == "dali":
        require_dali()
    config.samples_per_rank(world_size)
    steps_per_epoch(index.epoch_samples, config)


def ready_batches(config: RunConfig, world_size: int, device: torch.device) -> ReadyBatches:
    """Return what the loaders of a run's ranks on this host hold ready; nothing counts with DALI: encoded pictures."""
    workers = config.data.workers
    workers = default_workers(world_size, device) if workers is None else workers
    crops = config.data.decoder == "torch"
    nbytes = block_bytes(batch_fields(config, config.samples_per_rank(world_size))) if crops else 0
    return ReadyBatches(ranks_of_this_host(unknown=1), workers, config.data.prefetch, nbytes)


def default_workers(world_size: int, device: torch.device) -> int:
    """Return the loader processes of each rank where the config does not say: this host's cores shared out."""
    cores = usable_cores() // ranks_of_this_host(unknown=world_size)
    fewest = 0 if device.type == "cpu" else 1  # so that loading and the GPU's work overlap
    return max(fewest, min(MOST_WORKERS, cores - 1))


class _StepsFrom(Sampler[int]):
    """All steps of a run from a step on."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._start)


def _without_child_signals(loader: "DataLoader[Loaded]") -> Iterator[Loaded]:
    """Start a loader's workers, and leave the handler of SIGCHLD as it was.

    torch's handler raises a dead worker's error at any place in the training process, even in a collective. Without
    the handler the death is noticed where a batch is asked for, within seconds.
    """
    with no_collection():
        if threading.current_thread() is not threading.main_thread():
            return iter(loader)
        handler = signal.getsignal(signal.SIGCHLD)
        results = iter(loader)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
    return results


def _as_is(loaded: Any) -> Any:
    return loaded
