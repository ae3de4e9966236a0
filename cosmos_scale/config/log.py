"""The section `log`: what is written down."""

from typing import Literal

from pydantic import Field

from cosmos_scale.config.section import RESUME_MAY_CHANGE, Section


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
