"""The keys of an evaluator of the kind `segmentation`."""

from typing import Annotated, Literal

from pydantic import Field

from cosmos_scale.config.evaluator import EvaluatorConfig
from cosmos_scale.config.section import MAY_DIFFER_BY_HOST, RESUME_MAY_CHANGE, Fraction, Place, redact_urls, refuse
from cosmos_scale.set_names import MaskedSet

WITH_BACKGROUND = ("voc21", "context60", "coco_object")
"""Public sets whose label 0 is the background."""

_OWN = ("images", "masks", "classes")


class SegmentationConfig(EvaluatorConfig):
    """Zero-shot segmentation of pictures by the names of their classes."""

    kind: Literal["segmentation"] = Field(description="what is measured", json_schema_extra=RESUME_MAY_CHANGE)
    name: str = Field(
        "segmentation",
        description="stands before the names of its numbers where it is not the kind",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    dataset: MaskedSet | None = Field(
        None,
        description="which public set lies in data; null: a set of one's own, in images, masks and classes",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    data: Place | None = Field(
        None,
        description="folder of the public set (docs/evaluation.md: where each set's files lie)",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    images: Place | None = Field(
        None, description="own set: folder of pictures, with folders in it or not", json_schema_extra=MAY_DIFFER_BY_HOST
    )
    masks: Place | None = Field(
        None,
        description="own set: folder of PNG masks, named and placed as their pictures; a pixel's value is its class, "
        "255: ignored",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    classes: Place | None = Field(
        None,
        description="text file with a line a class, its names separated by a comma and a blank; null: the public "
        "set's names",
        json_schema_extra=MAY_DIFFER_BY_HOST,
    )
    reduce_zero: bool = Field(
        False,
        description="own set: a pixel's value is its class plus one, and 0 is ignored like 255",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    background: bool = Field(
        False,
        description="own set: class 0 is the background, which pixels without a class fall to",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    names: Literal["corrected", "published"] = Field(
        "corrected",
        description="published: public sets' class names as the published evaluation spelt them (trafficlight)",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    csa: bool = Field(
        False,
        description="correlative self-attention in the image tower's last block",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    short_side: int | None = Field(
        None,
        gt=0,
        le=2048,
        description="pixels that a picture's shorter side is resized to; null: the public set's (own sets: 336), for "
        "image_size 224; with another image_size in proportion",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    crop: int | None = Field(
        None,
        ge=0,
        description="side of the sliding window in pixels; 0: the whole picture at once; null: the model's image_size",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    stride: int | None = Field(
        None, gt=0, description="pixels between windows; null: half of crop", json_schema_extra=RESUME_MAY_CHANGE
    )
    logit_scale: float | None = Field(
        None,
        gt=0,
        description="factor of the cosines in the softmax over names; null: the public set's (own sets: 40)",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    prob_threshold: Fraction | None = Field(
        None,
        description="pixels whose best class is less probable become background; null: the public set's (own sets: 0)",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    area_threshold: Fraction | None = Field(
        None,
        description="share of the foreground that a class must exceed in a picture, or it is taken out; 0: no class "
        "is; null: the public set's (own sets: 0)",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    pamr_steps: int = Field(
        0, ge=0, le=1000, description="steps of pixel-adaptive refinement; 0: none", json_schema_extra=RESUME_MAY_CHANGE
    )
    pamr_dilations: tuple[Annotated[int, Field(gt=0, le=1024)], ...] = Field(
        (8, 16),
        min_length=1,
        description="distances in pixels of the neighbours that the refinement looks at",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    max_samples: int | None = Field(
        None,
        gt=0,
        description="first pictures of the set that are used; null: all",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    per_class: bool = Field(
        False, description="whether the IoU of each class is among the numbers", json_schema_extra=RESUME_MAY_CHANGE
    )
    overlays: int = Field(
        0,
        ge=0,
        description="first pictures that are drawn with their true and predicted labels; 0: none",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    batch: int = Field(
        64, gt=0, le=100_000, description="windows encoded at a time, per rank", json_schema_extra=RESUME_MAY_CHANGE
    )

    @property
    def has_background(self) -> bool:
        """Whether label 0 is the background."""
        return self.background if self.dataset is None else self.dataset in WITH_BACKGROUND

    def describe(self) -> str:
        """A few words on what is measured on what."""
        if self.dataset is None:
            return f"segmentation on {redact_urls(self.images or '')}"
        return f"segmentation of {self.dataset} on {redact_urls(self.data or '')}"

    def _check_rules(self) -> None:
        super()._check_rules()
        if self.dataset is None:
            for key in _OWN:
                if getattr(self, key) is None:
                    refuse(key, None, "must be given where dataset is null, a set of one's own", ["dataset"])
            if self.data is not None:
                refuse("data", self.data, "needs dataset, the name of the public set in that folder", ["dataset"])
        else:
            if self.data is None:
                refuse("data", None, f"must be given: the folder that holds {self.dataset}", ["dataset"])
            for key in ("images", "masks", "reduce_zero", "background"):
                if getattr(self, key):
                    refuse(key, getattr(self, key), f"is for a set of one's own, not {self.dataset}", ["dataset"])
        if not self.has_background:
            for key in ("prob_threshold", "area_threshold"):
                if getattr(self, key):
                    rule = "must be 0 where class 0 is no background, since pixels below it would become class 0"
                    refuse(key, getattr(self, key), rule, ["dataset", "background"])
