"""The section `eval`: evaluation during training."""

from pydantic import Field

from cosmos_scale.config.section import MAY_DIFFER_BY_HOST, RESUME_MAY_CHANGE, Place, Section, refuse


class RetrievalConfig(Section):
    """Held-out pairs for image-text retrieval."""

    shards: Place = Field(
        description="folder or glob / brace pattern of .tar files, here or at a URL; or pipe:COMMAND, with braces",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    index: Place | None = Field(
        None, description="folder of the index files; null: beside the shards", json_schema_extra=MAY_DIFFER_BY_HOST
    )
    captions: str = Field(
        "raw_caption", description="json key of the captions that count as correct", json_schema_extra=RESUME_MAY_CHANGE
    )
    max_samples: int | None = Field(
        None,
        gt=0,
        description="first samples of the shards that are used; null: all",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    batch: int = Field(64, gt=0, description="samples encoded at a time, per rank", json_schema_extra=RESUME_MAY_CHANGE)


class EvalConfig(Section):
    """Evaluation during training."""

    every: int = Field(0, ge=0, description="steps between evaluations; 0: never", json_schema_extra=RESUME_MAY_CHANGE)
    retrieval: RetrievalConfig | None = Field(None, json_schema_extra=RESUME_MAY_CHANGE)

    def _check_rules(self) -> None:
        if self.every and self.retrieval is None:
            refuse("every", self.every, "needs eval.retrieval, the pairs to evaluate on", ["retrieval"])
