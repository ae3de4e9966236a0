"""The section `log`: what is written down."""

import re
from typing import Literal

from pydantic import Field

from cosmos_scale.config.section import RESUME_MAY_CHANGE, Section, refuse


class WandbConfig(Section):
    """Records at Weights & Biases; null: none."""

    project: str = Field(
        "cosmos-scale",
        description="project that the run appears in: at most 128 characters, none of / \\ # ? % :",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    mode: Literal["online", "offline"] | None = Field(
        None,
        description="online: send records as they come; offline: keep them in the run's folder; null: as the "
        "environment's WANDB_MODE says, else online",
        json_schema_extra=RESUME_MAY_CHANGE,
    )

    def _check_rules(self) -> None:
        if not re.fullmatch(r"[^/\\#?%:\n]{1,128}", self.project):  # what the service takes
            refuse("project", self.project, "must be at most 128 characters, none of / \\ # ? % :")


class LogConfig(Section):
    """What is written down; metrics.jsonl always, each record with its `time` in seconds since 1970 (UTC)."""

    every: int = Field(
        10,
        gt=0,
        description="steps between records in metrics.jsonl and lines on the console",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    tensorboard: bool = Field(
        False,
        description="whether to write TensorBoard files too, in the run's folder",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    wandb: WandbConfig | None = Field(None, json_schema_extra=RESUME_MAY_CHANGE)
    level: Literal["info", "warning", "error"] = Field(
        "error",
        description="least level of the messages of torch and DeepSpeed that are shown; of levels below error those "
        "of rank 0 alone",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    progress: bool = Field(
        True, description="whether to show a progress bar on a terminal", json_schema_extra=RESUME_MAY_CHANGE
    )
