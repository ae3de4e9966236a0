"""The section `optimizer`: AdamW and its learning rate."""

from typing import Literal

from pydantic import Field, field_validator

from cosmos_scale.config.section import Fraction, Section, refuse


class OptimizerConfig(Section):
    """AdamW with warm-up and cosine decay."""

    lr: float = Field(5e-4, gt=0.0, description="learning rate at the end of the warm-up, its highest value")
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.98), description="AdamW's decay per step of the means of gradients and of their squares; below 1"
    )
    eps: float = Field(1e-8, gt=0.0, description="AdamW's addition to the denominator")
    weight_decay: float = Field(
        0.5, ge=0.0, description="AdamW's weight decay; biases, norms, class token and scales have none"
    )
    warmup_steps: int = Field(2000, ge=0, description="steps in which the learning rate rises from near 0 to lr")
    clip_norm: float | None = Field(
        None, gt=0.0, description="larger gradient norms are scaled down to this one; null: never"
    )
    gradient_scale: Literal["true", "published"] = Field(
        "true",
        description="true: the global loss's gradient; published: 1 / world size of it, except for the logit scales",
    )

    @field_validator("gradient_scale", mode="before")
    @classmethod
    def _word_true(cls, value: object) -> object:
        return "true" if value is True else value  # YAML reads a bare `true` as a boolean

    def _check_rules(self) -> None:
        for position, beta in enumerate(self.betas):
            if beta >= 1.0:
                refuse(f"betas.{position}", beta, "must be less than 1")
