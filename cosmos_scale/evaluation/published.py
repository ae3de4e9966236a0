"""Published numbers of COSMOS models, to stand beside one's own.

Sources: the README of COSMOS (retrieval, ImageNet), result sites that list the paper's table (mIoU), SCLIP's README.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_RECALLS = ("image_to_text_R@1", "text_to_image_R@1")
_TABLE = {  # recalls of COCO val2017, then of Flickr30k val, each image to text and text to image; ImageNet's top-1
    "cc3m_vitb16": (53.1, 40.1, 84.1, 68.6, 37.1),
    "cc12m_vitb16": (64.2, 48.9, 91.4, 76.2, 51.4),
    "yfcc15m_vitb16": (67.5, 50.9, 92.6, 79.6, 52.4),
    "merged30m_vitb16": (68.0, 52.5, 92.9, 80.3, 57.6),
    "pixelprose_vitb16": (62.4, 43.4, 89.9, 73.6, 59.6),
    "cc3m_vitb32": (47.6, 33.5, 74.3, 59.2, 33.0),
    "cc12m_vitb32": (59.6, 43.0, 86.5, 69.8, 46.7),
    "yfcc15m_vitb32": (64.5, 46.0, 90.2, 73.3, 48.1),
    "merged30m_vitb32": (64.3, 48.4, 89.9, 76.1, 53.4),
    "pixelprose_vitb32": (57.2, 38.9, 85.6, 66.3, 54.3),
}
_MERGED30M_VITB16 = {
    "voc20": 77.7,
    "context59": 33.7,
    "coco_object": 31.3,
    "coco_stuff": 23.2,
    "cityscapes": 34.7,
    "ade20k": 17.7,
}
_SCLIP = {
    "voc20": 81.54,
    "voc21": 59.63,
    "context59": 34.46,
    "context60": 31.74,
    "coco_object": 33.52,
    "coco_stuff": 22.77,
    "cityscapes": 32.34,
    "ade20k": 16.45,
}
_COSMOS_CAVEATS = (
    "Precision: retrieval and classification were measured under autocast (amp), here in float32: near ties differ.",
    "Split: COCO is the whole val2017 (not Karpathy's test split), Flickr30k is val (not test).",
    "Weights: retrieval and classification may be of student or teacher, which is not stated; mIoU are of the teacher.",
    "Names: as the published evaluation spelt them (--names published); other spellings change the texts.",
)
_MIOU_CAVEATS = (
    "CSA: which of the mIoU were measured with it is not stated; both are shown.",
    "Model: that the mIoU are of Merged30M is concluded from the row of the paper's table, as result sites list it.",
)


class PublishedRow(NamedTuple):
    """What was published of one model. caveats: sentences on what must be known of its numbers.

    shares: in percent, by set and number. teacher_only: sets whose published numbers are the teacher's. csa: whether
    mIoU was measured with correlative self-attention; None: not stated.
    """

    shares: Mapping[tuple[str, str], float]
    caveats: Sequence[str]
    csa: bool | None = None
    teacher_only: Sequence[str] = ()

    def share(self, dataset: str, number: str, weights: str, csa: bool | None) -> float | None:
        """The published share in percent that a number compares with; None where there is none.

        weights: the model measured. csa: whether with correlative self-attention; None where that means nothing.
        """
        if (dataset in self.teacher_only and weights != "teacher") or (self.csa is not None and csa != self.csa):
            return None
        return self.shares.get((dataset, number))


def _cosmos(name: str) -> PublishedRow:
    *recalls, top1 = _TABLE[name]
    places = [(dataset, number) for dataset in ("coco_val2017", "flickr30k_val") for number in _RECALLS]
    shares = {**dict(zip(places, recalls, strict=True)), ("imagenet", "top1"): top1}
    if name != "merged30m_vitb16":
        return PublishedRow(shares, _COSMOS_CAVEATS)
    shares |= _of_sets(_MERGED30M_VITB16)
    return PublishedRow(shares, (*_COSMOS_CAVEATS, *_MIOU_CAVEATS), teacher_only=tuple(_MERGED30M_VITB16))


def _of_sets(mean_iou: Mapping[str, float]) -> dict[tuple[str, str], float]:
    return {(dataset, "mIoU"): share for dataset, share in mean_iou.items()}


PUBLISHED_ROWS: Mapping[str, PublishedRow] = {
    **{name: _cosmos(name) for name in _TABLE},
    "sclip_openai_vitb16": PublishedRow(
        _of_sets(_SCLIP),
        ("OpenAI's CLIP ViT-B/16, no COSMOS model, with CSA, in float32, names as published (--names published).",),
        csa=True,
    ),
}
"""The rows by name; a COSMOS model's is the name of its config among the shipped ones."""


def row_of_file(path: Path) -> str:
    """Return the name of the row that a published file may have, by the file's name: cosmos_MODEL_DATA.pt."""
    return re.sub(r"^cosmos_([a-z]+\d+)_(\w+)$", r"\2_\1", path.stem)
