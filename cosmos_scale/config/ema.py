"""The section `ema`: the teacher as a moving average."""

from typing import Literal

from pydantic import Field

from cosmos_scale.config.section import Fraction, Section


class EmaConfig(Section):
    """The teacher as a moving average of the student."""

    momentum: Fraction = Field(
        0.99, description="share of itself that the teacher keeps at a step; the rest comes from the student"
    )
    schedule: Literal["fixed", "cosine"] = Field(
        "fixed", description="fixed: the same momentum at every step; cosine: it rises to 1 on a half cosine"
    )
    order: Literal["before_step", "after_step"] = Field(
        "before_step",
        description="the teacher follows the student's weights from before (published) or after (DINO) their update",
    )
