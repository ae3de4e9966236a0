"""The keys of an evaluator of the kind `classification`."""

from typing import Literal

from pydantic import Field

from cosmos_scale.config.evaluator import EvaluatorConfig
from cosmos_scale.config.section import MAY_DIFFER_BY_HOST, RESUME_MAY_CHANGE, Place, redact_urls, refuse
from cosmos_scale.set_names import LabelledLayout


class ClassificationConfig(EvaluatorConfig):
    """Zero-shot classification of pictures by the names of their classes."""

    kind: Literal["classification"] = Field(description="what is measured", json_schema_extra=RESUME_MAY_CHANGE)
    name: str = Field(
        "classification",
        description="stands before the names of its numbers where it is not the kind",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    dataset: LabelledLayout = Field(
        "folders",
        description="which set, or which layout: folders: a folder of pictures a class; webdataset: .tar files with "
        "labels (.cls) and classnames.txt",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    data: Place = Field(
        description="folder of the set (docs/evaluation.md: where each set's files lie)",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    classes: Place | None = Field(
        None,
        description="text file with a line a class, its names separated by a comma and a blank; null: the set's names, "
        "or classnames.txt of the folder, or else the names of its folders",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    templates: Place | None = Field(
        None,
        description="text file with a template a line, {} or {c} for the name; null: the set's templates, or "
        "templates.txt of the folder, or else: a photo of a {}.",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    names: Literal["corrected", "published"] = Field(
        "corrected",
        description="published: the class names of the published evaluation, with its misspelt ones",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    split: Place | None = Field(
        None,
        description="sun397: text file with the pictures that count, a path a line, as in the set's own split files; "
        "null: all pictures",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    confusions: int = Field(
        0,
        ge=0,
        description="pairs of classes named that are confused most often, beside a picture of all confusions; 0: none",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    batch: int = Field(
        64, gt=0, le=100_000, description="pictures encoded at a time, per rank", json_schema_extra=RESUME_MAY_CHANGE
    )

    def describe(self) -> str:
        """A few words on what is measured on what."""
        what = "" if self.dataset in ("folders", "webdataset") else f" of {self.dataset}"
        return f"classification{what} on {redact_urls(self.data)}"

    def _check_rules(self) -> None:
        super()._check_rules()
        if self.split is not None and self.dataset != "sun397":
            refuse("split", self.split, "must be null where dataset is not sun397", ["dataset"])
