"""A run's parts before and between its steps: data, start, models, evaluation, checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cosmos_scale.checkpoint.files import BrokenCheckpoint
from cosmos_scale.checkpoint.resume import PassedOver, Start, find_start, set_aside
from cosmos_scale.checkpoint.state import RunState, find_checkpoint, load_checkpoint, load_model
from cosmos_scale.checkpoint.writer import CheckpointWriter
from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import changed_on_resume, dump_config
from cosmos_scale.data.shards.index import MergedIndex, open_sources
from cosmos_scale.data.training.loader import TrainLoader
from cosmos_scale.engine.ranks import Ranks, check_precision, from_all, raise_together
from cosmos_scale.engine.requirements import check_model
from cosmos_scale.engine.student import Student
from cosmos_scale.engine.teacher import DTYPES, Teacher
from cosmos_scale.errors import UserError
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.run.evaluations import Evaluations


@dataclass
class Run:
    """What `prepare` found and opened; the same start on every rank."""

    config: RunConfig
    ranks: Ranks
    folder: Path
    index: MergedIndex
    loader: TrainLoader
    evaluations: Evaluations
    start: Start
    said: list[str] = field(default_factory=list)  # lines on what became of broken checkpoints

    @property
    def first_step(self) -> int:
        """Steps done before this launch."""
        return 0 if self.start.state is None else self.start.state.step

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    def describe(self, last_step: int) -> str:
        """One line on what starts."""
        origin = "new run"
        if self.start.checkpoint is not None:
            assert self.start.state is not None
            origin = f"resumed from {self.start.checkpoint} (written at world size {self.start.state.world_size})"
            if self.start.state.lost_shards:
                origin += f", which has lost {len(self.start.state.lost_shards)} shards"
        elif self.config.init_from is not None:
            origin = f"new run from the weights of {self.config.init_from}"
        steps = f"steps {self.first_step + 1}-{last_step}"
        if self.first_step >= last_step:
            steps = f"nothing left to do at step {self.first_step} of {last_step}"
        return "".join(f"{line}\n" for line in self.said) + (
            f"{self.folder}: {origin}; {self.index.epoch_samples} samples and {self.loader.steps_per_epoch} steps an "
            f"epoch, {steps}, global batch {self.config.train.global_batch} on "
            f"{self.ranks.world_size} ranks ({self.ranks.device.type}, {self.config.precision}, ZeRO "
            f"{self.config.zero.stage})"
        )

    def build_models(self) -> tuple[Student, Teacher]:
        """Student and teacher at the run's start: initialised, from other weights, or as the checkpoint has them."""
        model, teacher_model = CosmosModel(self.config.model), CosmosModel(self.config.model)
        error = None
        try:
            if self.config.init_from is not None and self.start.checkpoint is None:
                origin = find_checkpoint(self.config.init_from)
                load_model(model, origin, "student")
                load_model(teacher_model, origin, "teacher")
            else:
                model.init_weights(torch.Generator().manual_seed(self.config.seed))
                teacher_model.load_state_dict(model.state_dict())
        except UserError as failure:
            error = UserError(f"init_from: {failure}")
        raise_together(self.ranks, error)
        student = Student(model, dict(teacher_model.named_parameters()), self.config, self.ranks)
        if self.start.checkpoint is not None:
            self._restore(student)
        return student, Teacher(teacher_model, student, self.config)

    def writer(self, student: Student) -> CheckpointWriter:
        """What writes the run's checkpoints, beside the training."""
        return CheckpointWriter(self.checkpoints, student.fragments, self.ranks.control, self.config.checkpoint)

    def state(self, step: int, student: Student) -> RunState:
        """What a checkpoint says of the run after a number of steps."""
        return RunState(
            step=step,
            samples=step * self.config.train.global_batch,
            updates=student.updates,
            world_size=self.ranks.world_size,
            loss_scaler=student.loss_scaler(),
            data=self.index.fingerprint(),
            config=self.config.model_dump(mode="json"),
            lost_shards=self.loader.lost_shards,
            steps_per_epoch=self.loader.steps_per_epoch,
        )

    def _restore(self, student: Student) -> None:
        """Load the start's checkpoint; with `resume: auto` an older one where a file turns out to be damaged."""
        while True:
            assert self.start.checkpoint is not None
            broken = error = None
            try:
                state = load_checkpoint(self.start.checkpoint, student.fragments)
                student.updates = state.updates
                student.set_loss_scaler(state.loss_scaler)
            except BrokenCheckpoint as failure:
                broken = str(failure)
            except UserError as failure:
                error = failure
            raise_together(self.ranks, error)
            broken = next((text for text in from_all(broken, self.ranks) if text is not None), None)
            if broken is None:
                self._set_aside()
                student.weights_changed()
                return
            self._go_back(broken)

    def _go_back(self, broken: str) -> None:
        """Start from an older checkpoint, since this one cannot be read; collective."""
        error = None
        try:
            if self.config.resume != "auto":
                raise UserError(broken)
            assert self.start.checkpoint is not None
            known = (*self.start.broken, PassedOver(self.start.checkpoint, broken))
            self.start = find_start(self.config, self.checkpoints, self.index.fingerprint(), known)
            assert self.start.state is not None
            self.loader.lost_shards = self.start.state.lost_shards
        except UserError as failure:
            error = failure
        raise_together(self.ranks, error)
        _check_same_start(self.start, self.ranks)

    def _set_aside(self) -> None:
        """Rename the broken checkpoints that were passed over; collective."""
        error = None
        if self.ranks.is_main:
            try:
                for folder, reason in self.start.broken:
                    self.said.append(f"passed over a broken checkpoint, now {set_aside(folder).name}: {reason}")
            except UserError as failure:
                error = failure
        raise_together(self.ranks, error)


def prepare(config: RunConfig, ranks: Ranks) -> Run:
    """Open data and find the start; collective, raises UserError on all ranks alike."""
    folder = config.output / config.name
    run, error = None, None
    try:
        check_precision(config.precision)
        check_model(config.model, ranks.device, DTYPES[config.precision])
        tokenizer = Tokenizer(config.model.text.context_length)
        index = open_sources(config.data.sources, config.data.remote)
        start = find_start(config, folder / "checkpoints", index.fingerprint())
        lost = {} if start.state is None else start.state.lost_shards
        damaged = folder / "damaged.jsonl"
        loader = TrainLoader(config, index, tokenizer, ranks.rank, ranks.world_size, damaged, lost, device=ranks.device)
        loader.check_shards(resumed=start.state is not None)
        evaluations = Evaluations(config, ranks, folder)
        if ranks.is_main:
            _write_config(config, folder)
        run = Run(config, ranks, folder, index, loader, evaluations, start)
    except UserError as failure:
        error = failure
    raise_together(ranks, error)
    assert run is not None
    _require_one_run(run)
    return run


def _require_one_run(run: Run) -> None:
    """Raise UserError, on all ranks, where hosts read other files than one another under the same names; collective."""
    found = from_all((run.config, run.index.fingerprint()), run.ranks)
    configs, indexes = zip(*found, strict=True)
    for rank, config in enumerate(configs):
        if changed := changed_on_resume(configs[0], config):
            raise UserError(
                f"rank {rank} and rank 0 differ in {', '.join(changed)}; rule: all ranks share one run's keys"
            )
    rule = "rule: every host has the same index, so copy it along with the shards"
    _require_same("data.sources: ranks see different indexes", indexes, rule)
    _check_same_start(run.start, run.ranks)


def _check_same_start(start: Start, ranks: Ranks) -> None:
    """Raise UserError where the ranks would start from different checkpoints; collective."""
    found = from_all(start.checkpoint, ranks)
    _require_same("output: ranks see different newest checkpoints", found, "rule: all ranks share one folder")


def _require_same(problem: str, found: Sequence[object], rule: str) -> None:
    if len(set(found)) > 1:
        seen = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(found))
        raise UserError(f"{problem} ({seen}); {rule}")


def _write_config(config: RunConfig, folder: Path) -> None:
    """Leave the resolved configuration beside what the run writes; shows at once whether it can write there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(config))
    except OSError as failure:
        raise UserError(f"output: {folder} cannot be written to: {failure.strerror}") from failure
