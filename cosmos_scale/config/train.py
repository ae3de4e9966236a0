"""The section `train`: batch, length and memory of a run."""

from pydantic import Field

from cosmos_scale.config.section import RESUME_MAY_CHANGE, Section


class TrainConfig(Section):
    """Length and batch of the run."""

    global_batch: int = Field(1024, gt=0, le=10_000_000, description="samples per step over all ranks")
    micro_batches: int = Field(
        1,
        gt=0,
        le=10_000_000,
        description="parts that a rank cuts its share of a batch into, to save memory; the loss is of the whole batch",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    recompute: int = Field(
        0,
        ge=0,
        le=1_000,
        description="every n-th block of the towers is computed again in the backward, to save memory; 1: all; 0: none",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    teacher_graph: bool = Field(
        True,
        description="whether a GPU replays the teacher's image tower as a CUDA graph, at ZeRO stages 0 to 2: one "
        "launch for hundreds, and memory for one forward of it",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    epochs: int = Field(
        32, gt=0, le=1_000_000, description="epochs that the schedules span, where schedule_steps is null"
    )
    epoch_steps_multiple: int = Field(
        1,
        gt=0,
        le=1_000_000,
        description="an epoch's steps are rounded up to a multiple of this (published runs: 16, their workers)",
    )
    max_steps: int | None = Field(
        None,
        gt=0,
        description="stop after this step; the schedules keep their length; null: at their end",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    max_minutes: float | None = Field(
        None,
        gt=0.0,
        le=1000000000.0,
        description="minutes after its start at which a launch stops, with a checkpoint; null: never",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    watchdog_seconds: float = Field(
        1800.0,
        ge=0.0,
        le=1000000000.0,
        description="seconds without progress after which a run writes every rank's stacks to hang-rank-N.txt in its "
        "folder and ends with status 1; four times as long for the start, the first step, an evaluation and a "
        "checkpoint; 0: never",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    schedule_steps: int | None = Field(
        None, gt=0, description="length of the schedules in steps; null: epochs x steps per epoch"
    )
