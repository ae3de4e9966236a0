"""The typed configuration of a run: every key, its default, its unit and the rules between keys.

`cosmos_scale.config_file` reads it from YAML (extends, dotted overrides); the section `data` is `config_data`'s. Keys
marked RESUME_MAY_CHANGE may differ between a checkpoint and the run that resumes it; every other key belongs to the
run's identity.
"""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from cosmos_scale.config_data import DataConfig
from cosmos_scale.config_section import RESUME_MAY_CHANGE, Fraction, Place, RuleBroken, Section, refuse
from cosmos_scale.errors import UserError

TOKENIZER_VOCABULARY = 49408  # CLIP's byte-pair vocabulary, start and end tokens included


class VisionConfig(Section):
    """The image tower (ViT)."""

    image_size: int = Field(224, gt=0, description="side of the global crops in pixels")
    patch_size: int = Field(16, gt=0)
    width: int = Field(768, gt=0)
    layers: int = Field(12, gt=0)
    head_width: int = Field(64, gt=0)

    def _check_rules(self) -> None:
        if self.width % self.head_width:
            refuse("width", self.width, f"must be a multiple of head_width ({self.head_width})", ["head_width"])
        if self.image_size % self.patch_size:
            refuse(
                "image_size", self.image_size, f"must be a multiple of patch_size ({self.patch_size})", ["patch_size"]
            )


class TextConfig(Section):
    """The causal text tower."""

    context_length: int = Field(77, gt=2)
    vocab_size: int = Field(TOKENIZER_VOCABULARY, gt=2)
    width: int = Field(512, gt=0)
    layers: int = Field(12, gt=0)
    heads: int = Field(8, gt=0)

    def _check_rules(self) -> None:
        if self.width % self.heads:
            refuse("width", self.width, f"must be a multiple of heads ({self.heads})", ["heads"])


class ModelConfig(Section):
    """Both towers and the cross-modality heads."""

    embed_dim: int = Field(512, gt=0)
    pooler_heads: int = Field(8, gt=0)
    text_padding: Literal["attend", "mask"] = Field(
        "attend", description="whether the text pooler's keys include padding (published) or not"
    )
    attention: Literal["auto", "flash_attn_4", "flash_attn_2", "torch_varlen", "xformers", "sdpa"] = Field(
        "auto",
        description="back end of attention; auto: the first that runs with device, precision and head sizes",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    compile: bool = Field(
        False,
        description="compile the towers' blocks by torch.compile: meant for GPUs; a CPU gains nothing measurable",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()

    def _check_rules(self) -> None:
        if self.text.width != self.embed_dim:
            rule = f"must equal model.embed_dim ({self.embed_dim}): the text pooler's queries and keys share one width"
            refuse("text.width", self.text.width, rule, ["embed_dim"])
        if self.embed_dim % self.pooler_heads:
            rule = f"must be a multiple of pooler_heads ({self.pooler_heads})"
            refuse("embed_dim", self.embed_dim, rule, ["pooler_heads"])


class OptimizerConfig(Section):
    """AdamW with warm-up and cosine decay."""

    lr: float = Field(5e-4, gt=0.0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    eps: float = Field(1e-8, gt=0.0)
    weight_decay: float = Field(0.5, ge=0.0)
    warmup_steps: int = Field(2000, ge=0)
    clip_norm: float | None = Field(None, gt=0.0, description="gradient norm clipping; null: none")
    gradient_scale: Literal["true", "published"] = Field(
        "true",
        description="the gradient of the global loss, or the published 1 / world size of it (not for the scales)",
    )

    @field_validator("gradient_scale", mode="before")
    @classmethod
    def _word_true(cls, value: object) -> object:
        return "true" if value is True else value  # YAML reads a bare `true` as a boolean

    def _check_rules(self) -> None:
        for position, beta in enumerate(self.betas):
            if beta >= 1.0:
                refuse(f"betas.{position}", beta, "must be less than 1")


class EmaConfig(Section):
    """The teacher as a moving average of the student."""

    momentum: Fraction = 0.99
    schedule: Literal["fixed", "cosine"] = "fixed"
    order: Literal["before_step", "after_step"] = Field(
        "before_step", description="teacher moves from the student before (published) or after (DINO) its update"
    )


class ZeroConfig(Section):
    """How DeepSpeed shards the student's and the teacher's states."""

    stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="shards the fp32 states from 1 on, gradients from 2 on, weights at 3",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    offload: bool = Field(
        False,
        description="keep masters, moments and average in the host's memory and update them there",
        json_schema_extra=RESUME_MAY_CHANGE,
    )

    def _check_rules(self) -> None:
        if self.offload and self.stage == 0:
            refuse("offload", self.offload, "needs stage 1, 2 or 3: DeepSpeed offloads shards", ["stage"])


class TrainConfig(Section):
    """Length and batch of the run."""

    global_batch: int = Field(1024, gt=0, description="samples per step over all ranks")
    micro_batches: int = Field(
        1,
        gt=0,
        description="parts that each rank cuts its share of a batch into, to save memory; the loss stays the batch's",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    recompute: int = Field(
        0,
        ge=0,
        description="every n-th block of the towers is computed again in the backward, to save memory; 1: all; 0: none",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    epochs: int = Field(32, gt=0)
    epoch_steps_multiple: int = Field(
        1, gt=0, description="an epoch's steps are rounded up to this multiple (published runs: 16, their worker count)"
    )
    max_steps: int | None = Field(
        None,
        gt=0,
        description="stop after this step; the schedule keeps its length",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    max_minutes: float | None = Field(
        None, gt=0.0, description="stop after this wall time of this launch", json_schema_extra=RESUME_MAY_CHANGE
    )
    schedule_steps: int | None = Field(
        None, gt=0, description="length of the schedules; default: epochs x steps per epoch"
    )


class CheckpointConfig(Section):
    """When checkpoints are written, and how many stay; they lie under output/checkpoints."""

    every: int = Field(1000, ge=0, description="steps; 0: only at the end", json_schema_extra=RESUME_MAY_CHANGE)
    keep_last: int = Field(3, ge=1, json_schema_extra=RESUME_MAY_CHANGE)
    keep_every: int | None = Field(
        None,
        gt=0,
        description="checkpoints of steps that are multiples of it stay for good",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    at_start: bool = Field(False, description="also write step 0", json_schema_extra=RESUME_MAY_CHANGE)


class RetrievalConfig(Section):
    """Held-out pairs for image-text retrieval."""

    shards: Place = Field(json_schema_extra=RESUME_MAY_CHANGE)
    index: Place | None = Field(None, json_schema_extra=RESUME_MAY_CHANGE)
    captions: str = Field(
        "raw_caption", description="json key of the captions that count as correct", json_schema_extra=RESUME_MAY_CHANGE
    )
    max_samples: int | None = Field(None, gt=0, json_schema_extra=RESUME_MAY_CHANGE)
    batch: int = Field(64, gt=0, description="per rank", json_schema_extra=RESUME_MAY_CHANGE)


class EvalConfig(Section):
    """Evaluation during training."""

    every: int = Field(0, ge=0, description="steps; 0: never", json_schema_extra=RESUME_MAY_CHANGE)
    retrieval: RetrievalConfig | None = Field(None, json_schema_extra=RESUME_MAY_CHANGE)

    def _check_rules(self) -> None:
        if self.every and self.retrieval is None:
            refuse("every", self.every, "needs eval.retrieval, the pairs to evaluate on", ["retrieval"])


class WandbConfig(Section):
    """Weights & Biases."""

    project: str = Field("cosmos-scale", json_schema_extra=RESUME_MAY_CHANGE)
    mode: Literal["online", "offline"] = Field("online", json_schema_extra=RESUME_MAY_CHANGE)


class LogConfig(Section):
    """What is written down; metrics.jsonl always is."""

    every: int = Field(10, gt=0, description="steps between lines", json_schema_extra=RESUME_MAY_CHANGE)
    tensorboard: bool = Field(False, json_schema_extra=RESUME_MAY_CHANGE)
    wandb: WandbConfig | None = Field(None, json_schema_extra=RESUME_MAY_CHANGE)
    progress: bool = Field(True, description="progress bar on a terminal", json_schema_extra=RESUME_MAY_CHANGE)


class RunConfig(Section):
    """One training run."""

    name: str = Field("run", description="one path component; see output")
    output: Path = Field(Path("runs"), description="the run writes to output/name", json_schema_extra=RESUME_MAY_CHANGE)
    seed: int = Field(0, ge=0, lt=2**63, description="of everything that is drawn; fits torch's generators")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", json_schema_extra=RESUME_MAY_CHANGE)
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="a loss that is not finite stops the run, or its step is skipped",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    resume: str = Field(
        "auto",
        description="auto: newest checkpoint of output/name if any; never; or a folder",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    init_from: Path | None = Field(
        None, description="checkpoint whose weights start a new run", json_schema_extra=RESUME_MAY_CHANGE
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    zero: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    def _check_rules(self) -> None:
        if not re.fullmatch(r"[\w-][\w.-]*", self.name):
            refuse("name", self.name, "must be a folder's plain name: letters, digits, . _ - and no leading dot")
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
        if self.train.schedule_steps is not None:
            self._check_warmup(self.train.schedule_steps)

    def _check_warmup(self, total: int) -> None:
        if self.optimizer.warmup_steps >= total:
            rule = f"must be less than the schedule's {total} steps"
            refuse("optimizer.warmup_steps", self.optimizer.warmup_steps, rule, ["train.schedule_steps"])

    def micro_batch(self, world_size: int) -> int:
        """Return the samples per rank and step; raises UserError where the global batch does not divide evenly."""
        samples, rest = divmod(self.train.global_batch, world_size)
        if rest:
            raise UserError(
                f"train.global_batch: {self.train.global_batch} must be a multiple of the {world_size} ranks"
            )
        if samples % self.train.micro_batches:
            raise UserError(
                f"train.micro_batches: {self.train.micro_batches} must divide the {samples} samples of a rank"
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
