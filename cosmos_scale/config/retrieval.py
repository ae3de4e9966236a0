"""The keys of an evaluator of the kind `retrieval`."""

from typing import Literal

from pydantic import Field

from cosmos_scale.config.evaluator import EvaluatorConfig
from cosmos_scale.config.section import MAY_DIFFER_BY_HOST, RESUME_MAY_CHANGE, Place, redact_urls


class RetrievalConfig(EvaluatorConfig):
    """Image-text retrieval on held-out pairs."""

    kind: Literal["retrieval"] = Field(description="what is measured", json_schema_extra=RESUME_MAY_CHANGE)
    name: str = Field(
        "retrieval",
        description="stands before the names of its numbers where it is not the kind",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    shards: Place = Field(
        description="folder or glob / brace pattern of .tar files, here or at a URL; or pipe:COMMAND, with braces",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    index: Place | None = Field(
        None, description="folder of the index files; null: beside the shards", json_schema_extra=MAY_DIFFER_BY_HOST
    )
    captions: str | None = Field(
        None,
        description="json key of the captions that count as correct; null: raw_caption where there is one, else the "
        "only key of captions there is",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    max_samples: int | None = Field(
        None,
        gt=0,
        description="first samples of the shards that are used; null: all",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    batch: int = Field(
        64, gt=0, le=100_000, description="samples encoded at a time, per rank", json_schema_extra=RESUME_MAY_CHANGE
    )

    def describe(self) -> str:
        """A few words on what is measured on what."""
        return f"retrieval on {redact_urls(self.shards)}"
