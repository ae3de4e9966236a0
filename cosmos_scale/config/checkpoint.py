"""The section `checkpoint`: when checkpoints are written and how many stay."""

from pydantic import Field

from cosmos_scale.config.section import RESUME_MAY_CHANGE, Section


class CheckpointConfig(Section):
    """When checkpoints are written, and how many stay; they lie under output/NAME/checkpoints."""

    every: int = Field(
        1000, ge=0, description="steps between checkpoints; 0: only at the end", json_schema_extra=RESUME_MAY_CHANGE
    )
    keep_last: int = Field(
        3, ge=1, description="newest checkpoints that stay; older ones are deleted", json_schema_extra=RESUME_MAY_CHANGE
    )
    keep_every: int | None = Field(
        None,
        gt=0,
        description="steps; checkpoints at multiples of this number are never deleted; null: none are kept for good",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    failures: int = Field(
        3,
        ge=1,
        description="checkpoints in a row that could not be written, at which the run ends; after the first it is "
        "written again at once",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    at_start: bool = Field(
        False, description="whether to write a checkpoint of step 0 too", json_schema_extra=RESUME_MAY_CHANGE
    )
