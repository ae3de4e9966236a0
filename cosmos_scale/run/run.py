"""A run: everything that its steps need, made in one order by `start_run`, and what it says and writes of itself."""

from dataclasses import dataclass

from cosmos_scale.checkpoint.resume import Start
from cosmos_scale.checkpoint.state import RunState
from cosmos_scale.checkpoint.writer import CheckpointWriter
from cosmos_scale.config import RunConfig
from cosmos_scale.data.training.loader import TrainLoader
from cosmos_scale.data.training.order import steps_per_epoch
from cosmos_scale.engine.pair import Pair
from cosmos_scale.engine.ranks import Ranks
from cosmos_scale.run.folder import CHECKPOINTS, DAMAGE_FILE
from cosmos_scale.run.progress import Progress
from cosmos_scale.run.since_checkpoint import changed_since
from cosmos_scale.run.start import Opened, build_pair, open_run
from cosmos_scale.words import counted


@dataclass(frozen=True)
class Run:
    """What `start_run` made; the same start on every rank.

    start: where the run goes on. origin: where its first weights came from and what was done to them, on one line;
    empty where they were drawn. total_steps: length of the schedules. last_step: steps done at the end. said: lines on
    what became of broken checkpoints.
    """

    config: RunConfig
    ranks: Ranks
    opened: Opened
    pair: Pair
    start: Start
    origin: str
    loader: TrainLoader
    total_steps: int
    last_step: int
    said: list[str]

    @property
    def first_step(self) -> int:
        """Steps done before this launch."""
        return 0 if self.start.state is None else self.start.state.step

    def describe(self) -> str:
        """Lines on what starts."""
        began = "new run"
        if self.start.state is not None:
            began = f"resumed from {self.start.checkpoint} (written at world size {self.start.state.world_size})"
            if self.start.lost_shards:
                began += f", which has lost {counted(len(self.start.lost_shards), 'shard')}"
        elif self.origin:
            began = f"new run from the weights of {self.config.init_from}"
        steps = f"steps {self.first_step + 1}-{self.last_step}"
        if self.first_step >= self.last_step:
            steps = f"nothing left to do: step {self.first_step} is done, and the last one is {self.last_step}"
        world = counted(self.ranks.world_size, "rank")
        longer = self.config.describe_longer(self.loader.steps_per_epoch)
        lines = [
            *self.said,
            *(self._changed_since() if self.ranks.is_main else []),
            f"{self.opened.folder}: {began}; {counted(self.opened.index.epoch_samples, 'sample')} and "
            f"{counted(self.loader.steps_per_epoch, 'step')} an epoch",
            *([f"init_from: {self.origin}"] if self.origin and self.start.state is None else []),
            *([unread] if (unread := self.start.describe_unread()) else []),
            *([f"warning: {longer}"] if longer else []),
            f"{steps}, global batch {self.config.train.global_batch} on {world} ({self.ranks.device.type}, "
            f"{self.config.precision}, ZeRO {self.config.zero.stage})",
        ]
        return "\n".join(lines)

    def _changed_since(self) -> list[str]:
        opened = self.opened
        found = changed_since(self.config, opened.folder, self.start, opened.index, opened.galleries)
        return [f"warning: {line}" for line in found]

    def writer(self) -> CheckpointWriter:
        """Return what writes the run's checkpoints, beside the training."""
        folder = self.opened.folder / CHECKPOINTS
        return CheckpointWriter(folder, self.pair.student.fragments, self.ranks.control, self.config.checkpoint)

    def progress(self, checkpoints: CheckpointWriter) -> Progress:
        """Return what follows the run's steps, and says and writes how they go; collective."""
        return Progress(
            self.config,
            self.ranks,
            self.opened.folder,
            first_step=self.first_step,
            last_step=self.last_step,
            steps_per_epoch=self.loader.steps_per_epoch,
            skipped=0 if self.start.state is None else self.start.state.skipped_steps,
            substituted=0 if self.start.state is None else self.start.state.substituted,
            finish_saving=checkpoints.wait,
        )

    def state(self, step: int, progress: Progress) -> RunState:
        """Return what a checkpoint says of the run after a number of steps, which progress has read; collective."""
        return RunState(
            step=step,
            samples=step * self.config.train.global_batch,
            updates=self.pair.student.updates,
            world_size=self.ranks.world_size,
            loss_scaler=self.pair.student.layout.loss_scaler(),
            data=self.opened.index.fingerprint(),
            config=self.config.model_dump(mode="json"),
            lost_shards=self.loader.lost_shards,
            steps_per_epoch=self.loader.steps_per_epoch,
            marks=self.opened.marks,
            origin=self.origin,
            substituted=progress.unrecorded_substitutes(),
            skipped=progress.skipped,
            galleries={**({} if self.start.state is None else self.start.state.galleries), **self._known_galleries()},
        )

    def _known_galleries(self) -> dict[str, str]:
        return {name: gallery for name, gallery in self.opened.galleries.items() if gallery}


def start_run(config: RunConfig, ranks: Ranks) -> Run:
    """Open, build and restore a run; collective, raises UserError on all ranks alike.

    The loader comes last, when it is settled where the run goes on: it knows the shards lost until then. The run holds
    the lock on its folder until `opened.held` ends.
    """
    opened = open_run(config, ranks)
    try:
        epoch_steps = steps_per_epoch(opened.index.epoch_samples, config)
        total_steps, last_step = config.total_steps(epoch_steps), config.last_step(epoch_steps)
        pair, start, origin, said = build_pair(config, opened, ranks)
        loader = TrainLoader(
            config,
            opened.index,
            opened.tokenizer,
            ranks.rank,
            ranks.world_size,
            opened.folder / DAMAGE_FILE,
            start.lost_shards,
            device=ranks.device,
        )
        return Run(config, ranks, opened, pair, start, origin, loader, total_steps, last_step, said)
    except BaseException:
        opened.held.close()
        raise
