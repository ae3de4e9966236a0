"""The section `ema`: the teacher as a moving average."""

from typing import Literal

from pydantic import Field

from cosmos_scale.config.section import Fraction, Section


class EmaConfig(Section):
    """The teacher as a moving average of the student."""

    momentum: Fraction = 0.99
    schedule: Literal["fixed", "cosine"] = "fixed"
    order: Literal["before_step", "after_step"] = Field(
        "before_step", description="teacher moves from the student before (published) or after (DINO) its update"
    )
