"""The section `eval`: evaluation during training."""

from pydantic import Field

from cosmos_scale.config.section import RESUME_MAY_CHANGE, Place, Section, refuse


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
