"""The section `optimizer`: AdamW and its learning rate."""

from typing import Literal

from pydantic import Field, field_validator

from cosmos_scale.config.section import Fraction, Section, refuse


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
