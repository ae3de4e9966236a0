"""All public sets of pictures: where each may lie below one folder, which layout it has, and how it is measured."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cosmos_scale.config import ClassificationConfig, EvaluatorConfig, RetrievalConfig, SegmentationConfig
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets.captioned_files import COCO, FLICKR30K, KARPATHY
from cosmos_scale.evaluation.datasets.published_sets import PUBLISHED
from cosmos_scale.evaluation.evaluator import Evaluator, Setting
from cosmos_scale.evaluation.kinds import make_evaluator
from cosmos_scale.evaluation.segmentation.layouts import PUBLIC_LAYOUTS

Spelling = Literal["corrected", "published"]

_SECTIONS: dict[str, type[EvaluatorConfig]] = {
    "retrieval": RetrievalConfig,
    "classification": ClassificationConfig,
    "segmentation": SegmentationConfig,
}
_COCO_PLACES = ("", "coco", "COCO", "coco2017")
_FLICKR30K_PLACES = ("", "flickr30k", "Flickr30k", "flickr30k-images")
_IMAGENET_PLACES = ("", "imagenet/val", "imagenet", "ILSVRC2012/val", "ILSVRC2012")
_IMAGENET = "n01440764/ILSVRC2012_val_00000293.JPEG and so on: a folder for each wnid, with the validation pictures"
_KARPATHY_FILES = ("coco_karpathy_test.json", "dataset_coco.json")
_FOLDER_OF = {  # what lies in the folder of a set of classification, and in no other
    "food101": "food-101",
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "sun397": "SUN397",
    "stanford_car": "stanford_cars",
    "aircraft": "fgvc-aircraft-2013b",
    "dtd": "dtd/dtd",
    "pets": "oxford-iiit-pet",
    "caltech101": "caltech101/101_ObjectCategories",
    "flowers": "flowers-102",
}
_PICTURES = {  # of each set that is measured whole
    "coco_val2017": 5000,
    "coco_karpathy_test": 5000,
    "flickr30k_val": 1014,
    "flickr30k_test": 1000,
    "imagenet": 50000,
    "food101": 25250,
    "cifar10": 10000,
    "cifar100": 10000,
    "sun397": 108754,
    "stanford_car": 8041,
    "aircraft": 3333,
    "dtd": 1880,
    "pets": 3669,
    "caltech101": 5677,
    "flowers": 6149,
    "voc20": 1449,
    "voc21": 1449,
    "context59": 5104,
    "context60": 5104,
    "coco_object": 5000,
    "coco_stuff": 5000,
    "cityscapes": 500,
    "ade20k": 2000,
}


class PublicPlace(NamedTuple):
    """Where a public set may lie. layout: in words. csa: of segmentation; None for other kinds.

    places: folders below the given one, in the order they are looked at; the first is the given one itself. marks:
    files and folders of which one lies in the set's folder, and in no other.
    """

    kind: str
    dataset: str
    places: Sequence[str]
    marks: Sequence[str]
    layout: str
    csa: bool | None = None

    @property
    def title(self) -> str:
        """Names a measurement among all."""
        return f"{self.dataset}-csa" if self.csa else self.dataset

    @property
    def pictures(self) -> int:
        """How many pictures the whole set has."""
        return _PICTURES[self.dataset]

    @property
    def expected(self) -> str:
        """The layout, and where it may lie."""
        return f"{self.layout}; in it or in {' or '.join(self.places[1:])} below it"

    def folder(self, root: Path) -> Path | None:
        """Return the folder below `root` that holds the set, None where none does."""
        folders = [root / place for place in self.places]
        return next((folder for folder in folders if any((folder / mark).exists() for mark in self.marks)), None)

    def section(self, folder: Path, names: Spelling, batch: int) -> EvaluatorConfig:
        """The section of the config that measures the set in a folder."""
        keys: dict[str, Any] = {"kind": self.kind, "name": self.title, "dataset": self.dataset, "data": str(folder)}
        if self.kind != "retrieval":
            keys["names"] = names
        if self.csa is not None:
            keys["csa"] = self.csa
        return _SECTIONS[self.kind].model_validate({**keys, "batch": batch})


def _places() -> Iterator[PublicPlace]:
    coco, karpathy = ("coco_val2017", COCO), ("coco_karpathy_test", KARPATHY)
    yield PublicPlace("retrieval", coco[0], _COCO_PLACES, ("annotations/captions_val2017.json",), _without_name(*coco))
    marks = [f"{folder}{name}" for name in _KARPATHY_FILES for folder in ("annotations/", "")]
    yield PublicPlace("retrieval", karpathy[0], _COCO_PLACES, marks, _without_name(*karpathy))
    for split in ("val", "test"):
        name, layout = f"flickr30k_{split}", FLICKR30K.format(split=split)
        yield PublicPlace("retrieval", name, _FLICKR30K_PLACES, (f"{name}.json",), layout)
    yield PublicPlace("classification", "imagenet", _IMAGENET_PLACES, ("n01440764",), _IMAGENET)
    for name, published in PUBLISHED.items():
        yield PublicPlace("classification", name, ("", name), (_FOLDER_OF[name],), published.tree)
    for public, files in PUBLIC_LAYOUTS.items():
        for csa in (False, True):
            places = ("", *files.folders, *(_COCO_PLACES[1:] if public.startswith("coco") else ()))
            yield PublicPlace("segmentation", public, places, (files.masks,), files.tree(), csa)


def _without_name(name: str, layout: str) -> str:
    return layout.removeprefix(f"{name} is ")


PUBLIC_PLACES = tuple(_places())
"""All measurements, in the order they are made."""


class OpenedSet(NamedTuple):
    """A measurement. evaluator: None where the set is not there, or cannot be measured: then `reason` says why."""

    place: PublicPlace
    evaluator: Evaluator | None
    reason: str = ""


def open_set(place: PublicPlace, root: Path, setting: Setting, names: Spelling, batch: int) -> OpenedSet | None:
    """Open a set below a folder; None where nothing of it lies there."""
    folder = place.folder(root)
    if folder is None:
        return None
    try:
        return OpenedSet(place, make_evaluator(place.section(folder, names, batch), setting))
    except UserError as error:
        return OpenedSet(place, None, str(error))
