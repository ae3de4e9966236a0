"""The configuration of a run: its own keys, its sections, and the rules between them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cosmos_scale.config.checkpoint import CheckpointConfig
from cosmos_scale.config.data import DataConfig
from cosmos_scale.config.ema import EmaConfig
from cosmos_scale.config.evaluation import AnyEvaluatorConfig, check_names
from cosmos_scale.config.log import LogConfig
from cosmos_scale.config.model import TOKENIZER_VOCABULARY, ModelConfig
from cosmos_scale.config.optimizer import OptimizerConfig
from cosmos_scale.config.section import PLAIN_NAME, RESUME_MAY_CHANGE, RuleBroken, Section, refuse
from cosmos_scale.config.train import TrainConfig
from cosmos_scale.config.zero import ZeroConfig
from cosmos_scale.errors import UserError


class RunConfig(Section):
    """One training run."""

    name: str = Field("run", description="name of the run and of its folder in output")
    output: Path = Field(
        Path("runs"),
        description="folder of runs, shared by all hosts; the run writes to output/name",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="seed of every random draw: first weights, order of samples, crops, captions"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="auto: a GPU for each rank where torch sees any, else CPUs",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    precision: Literal["bf16", "fp32", "fp16"] = Field(
        "bf16", description="number format of forward and backward; updates, teacher average and losses are fp32"
    )
    kernels: Literal["auto", "torch"] = Field(
        "auto",
        description="auto: the project's Triton kernels where they serve, on GPUs (the loss's in bf16 and fp16); "
        "torch: none of them",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="stop: a loss or gradient that is not finite stops the run; skip: its step changes nothing",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    resume: str = Field(
        "auto",
        description="checkpoint to go on from; auto: the newest of output/name, if any; never: none; or a folder: "
        "a checkpoint's, or a run's",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    init_from: Path | None = Field(
        None,
        description="checkpoint, or folder of checkpoints, whose weights a new run starts from: a run's, or a COSMOS, "
        "OpenCLIP or Hugging Face CLIP model; null: drawn weights",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    init_heads: Literal["from", "new"] = Field(
        "from",
        description="cross-modality heads and distill_logit_scale of a run with init_from; from: those of init_from; "
        "new: drawn from seed, as CLIP models without them need",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    zero: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: tuple[Annotated[AnyEvaluatorConfig, Field(discriminator="kind")], ...] = Field(
        (), description="evaluators on student and teacher", json_schema_extra=RESUME_MAY_CHANGE
    )
    log: LogConfig = LogConfig()

    def _check_rules(self) -> None:
        if not PLAIN_NAME.fullmatch(self.name):
            refuse(
                "name",
                self.name,
                "must be a folder's plain name: at most 200 letters, digits, . _ - and no leading dot",
            )
        views, patch_size = self.data.views, self.model.vision.patch_size
        if views.local_crops and views.local_size % patch_size:
            rule = f"must be a multiple of model.vision.patch_size ({patch_size})"
            refuse(
                "data.views.local_size", views.local_size, rule, ["model.vision.patch_size", "data.views.local_crops"]
            )
        if self.data.sources and self.model.text.vocab_size < TOKENIZER_VOCABULARY:
            rule = f"must be at least {TOKENIZER_VOCABULARY}, the tokenizer's vocabulary"
            refuse("model.text.vocab_size", self.model.text.vocab_size, rule, ["data.sources"])
        if self.train.epoch_steps_multiple > 1 and self.data.last_batch == "drop":
            rule = f"must be pad where train.epoch_steps_multiple ({self.train.epoch_steps_multiple}) adds steps"
            refuse("data.last_batch", self.data.last_batch, rule, ["train.epoch_steps_multiple"])
        if self.model.compile and self.zero.stage == 3:
            rule = "must be false at zero.stage 3: weights are gathered inside of what would be compiled"
            refuse("model.compile", self.model.compile, rule, ["zero.stage"])
        if self.init_from is not None and self.resume not in ("auto", "never"):
            rule = "must be auto or never beside init_from: a run starts from one checkpoint"
            refuse("resume", self.resume, rule, ["init_from"])
        if self.init_heads == "new" and self.init_from is None:
            rule = "must be from without init_from: then all weights are drawn"
            refuse("init_heads", self.init_heads, rule, ["init_from"])
        check_names(self.eval)
        if self.train.schedule_steps is not None:
            self._check_warmup(self.train.schedule_steps)

    def _check_warmup(self, total: int) -> None:
        if self.optimizer.warmup_steps >= total:
            rule = f"must be less than the steps of the schedule, {total}"
            refuse("optimizer.warmup_steps", self.optimizer.warmup_steps, rule, ["train.schedule_steps"])

    def samples_per_rank(self, world_size: int) -> int:
        """Return the samples per rank and step; raises UserError where the global batch does not divide evenly."""
        samples, rest = divmod(self.train.global_batch, world_size)
        if rest:
            raise UserError(
                f"train.global_batch: {self.train.global_batch} must be a multiple of the {world_size} ranks"
            )
        if samples % self.train.micro_batches:
            raise UserError(
                f"train.micro_batches: {self.train.micro_batches} must divide the samples of a rank, {samples}"
            )
        return samples

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the length of the schedules in steps; raises UserError where the warm-up does not fit in."""
        total = self.train.schedule_steps or self.train.epochs * steps_per_epoch
        try:
            self._check_warmup(total)
        except RuleBroken as broken:
            raise UserError(str(broken)) from None
        return total

    def last_step(self, steps_per_epoch: int) -> int:
        """Return the number of steps after which the run ends: the schedules' length, or max_steps if that is less."""
        total = self.total_steps(steps_per_epoch)
        return total if self.train.max_steps is None else min(total, self.train.max_steps)

    def describe_longer(self, steps_per_epoch: int) -> str:
        """Return on one line that max_steps asks for more than the schedules have; nothing where it does not."""
        asked, total = self.train.max_steps, self.total_steps(steps_per_epoch)
        if asked is None or asked <= total:
            return ""
        return f"train.max_steps: {asked}; rule: it ends a run early, and this one's schedules end at step {total}"
