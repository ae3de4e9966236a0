"""The keys of an evaluator of the kind `retrieval`."""

from typing import Literal

from pydantic import Field

from cosmos_scale.config.evaluator import EvaluatorConfig
from cosmos_scale.config.section import MAY_DIFFER_BY_HOST, RESUME_MAY_CHANGE, Place, redact_urls, refuse
from cosmos_scale.set_names import CaptionedLayout


class RetrievalConfig(EvaluatorConfig):
    """Image-text retrieval on held-out pairs."""

    kind: Literal["retrieval"] = Field(description="what is measured", json_schema_extra=RESUME_MAY_CHANGE)
    name: str = Field(
        "retrieval",
        description="stands before the names of its numbers where it is not the kind",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    dataset: CaptionedLayout = Field(
        "shards",
        description="which set, or which layout: shards: indexed .tar files; webdataset: .tar files with captions in "
        ".txt, a line each; pairs: a .jsonl or .csv file",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    data: Place | None = Field(
        None,
        description="folder of the set (docs/evaluation.md: where each set's files lie), of pairs their file; null "
        "where dataset is shards",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    shards: Place | None = Field(
        None,
        description="where dataset is shards: folder or glob / brace pattern of .tar files, here or at a URL; or "
        "pipe:COMMAND, with braces",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    index: Place | None = Field(
        None, description="folder of the index files; null: beside the shards", json_schema_extra=MAY_DIFFER_BY_HOST
    )
    captions: str | None = Field(
        None,
        description="key of the captions that count as correct, in the json of shards or in pairs; null: raw_caption "
        "where there is one, else the only key of captions there is",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    max_samples: int | None = Field(
        None,
        gt=0,
        description="first samples that are used; null: all",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    batch: int = Field(
        64, gt=0, le=100_000, description="samples encoded at a time, per rank", json_schema_extra=RESUME_MAY_CHANGE
    )

    @property
    def place(self) -> str:
        """Where the pictures and captions are found."""
        return (self.shards if self.dataset == "shards" else self.data) or ""

    def describe(self) -> str:
        """A few words on what is measured on what."""
        what = "" if self.dataset in ("shards", "webdataset", "pairs") else f" of {self.dataset}"
        return f"retrieval{what} on {redact_urls(self.place)}"

    def _check_rules(self) -> None:
        super()._check_rules()
        of_shards = self.dataset == "shards"
        if of_shards and not self.shards:
            refuse("shards", self.shards, "must be a folder or pattern of .tar files", ["dataset"])
        if not of_shards and not self.data:
            refuse("data", self.data, f"must say where the files of {self.dataset} lie", ["dataset"])
        for key in ("data",) if of_shards else ("shards", "index"):
            if getattr(self, key) is not None:
                refuse(key, getattr(self, key), f"must be null where dataset is {self.dataset}", ["dataset"])
        if self.captions is not None and self.dataset not in ("shards", "pairs"):
            refuse("captions", self.captions, f"must be null where dataset is {self.dataset}", ["dataset"])
