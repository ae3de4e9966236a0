"""Which pictures a set has, and where their masks lie: the public sets by their folders, and sets of one's own."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.config import SegmentationConfig
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets.pictures import PICTURES, is_hidden, is_picture
from cosmos_scale.evaluation.segmentation.masks import (
    MaskLaw,
    cityscapes_labels,
    coco_object_labels,
    coco_stuff_labels,
    reduced_labels,
    stored_labels,
)
from cosmos_scale.files import read_regular, reason_of, text_lines, whole_path
from cosmos_scale.set_names import MaskedSet
from cosmos_scale.words import counted


class MaskedPicture(NamedTuple):
    """A picture and its mask. name: for messages and files, unique in the set. law: how the mask's file is read."""

    name: str
    image: Path
    mask: Path
    law: MaskLaw


class MaskFiles(NamedTuple):
    """What follows a picture's name in the name of its mask, and how such masks are read."""

    suffix: str
    law: MaskLaw


class PublicLayout(NamedTuple):
    """Where a public set's files lie below its folder, and how the published evaluation treats the set.

    folders: where the set's folder may lie below the given one. images, masks: folders. image_suffix: what follows a
    picture's name in its file's name. mask_files: the kinds of masks, the one that is taken first where there are both.
    split: the file that lists the pictures' names; None: all pictures below the folder count. short_side: pixels, for
    models of 224. The last three: see Recipe.
    """

    folders: tuple[str, ...]
    images: str
    image_suffix: str
    masks: str
    mask_files: tuple[MaskFiles, ...]
    split: str | None
    short_side: int = 336
    logit_scale: float = 40.0
    prob_threshold: float = 0.0
    area_threshold: float = 0.0

    def tree(self) -> str:
        """The files that the layout wants below its folder, in words."""
        masks = " or ".join(f"{self.masks}/*{files.suffix}" for files in self.mask_files)
        wanted = [f"{self.images}/*{self.image_suffix}", masks, *([self.split] if self.split else [])]
        return ", ".join(wanted)


def _voc(law: MaskLaw) -> PublicLayout:
    folders = ("VOC2012", "VOCdevkit/VOC2012")
    masks, split = (MaskFiles(".png", law),), "ImageSets/Segmentation/val.txt"
    return PublicLayout(folders, "JPEGImages", ".jpg", "SegmentationClass", masks, split)


def _context(law: MaskLaw) -> PublicLayout:
    folders = ("VOC2010", "VOCdevkit/VOC2010")
    masks, split = (MaskFiles(".png", law),), "ImageSets/SegmentationContext/val.txt"
    return PublicLayout(folders, "JPEGImages", ".jpg", "SegmentationClassContext", masks, split)


def _coco(*masks: MaskFiles) -> PublicLayout:
    return PublicLayout(("coco_stuff164k",), "images/val2017", ".jpg", "annotations/val2017", masks, None)


PUBLIC_LAYOUTS: Mapping[MaskedSet, PublicLayout] = {
    "voc20": _voc(reduced_labels),
    "voc21": _voc(stored_labels)._replace(logit_scale=65.0, prob_threshold=0.1, area_threshold=0.1),
    "context59": _context(reduced_labels),
    "context60": _context(stored_labels)._replace(logit_scale=50.0, prob_threshold=0.1),
    "coco_object": _coco(
        MaskFiles("_instanceTrainIds.png", stored_labels), MaskFiles(".png", coco_object_labels)
    )._replace(logit_scale=50.0, prob_threshold=0.1),
    "coco_stuff": _coco(MaskFiles("_labelTrainIds.png", stored_labels), MaskFiles(".png", coco_stuff_labels))._replace(
        short_side=448
    ),
    "cityscapes": PublicLayout(
        folders=("cityscapes",),
        images="leftImg8bit/val",
        image_suffix="_leftImg8bit.png",
        masks="gtFine/val",
        mask_files=(
            MaskFiles("_gtFine_labelTrainIds.png", stored_labels),
            MaskFiles("_gtFine_polygons.json", cityscapes_labels),
        ),
        split=None,
        short_side=560,
    ),
    "ade20k": PublicLayout(
        folders=("ADEChallengeData2016", "ade/ADEChallengeData2016"),
        images="images/validation",
        image_suffix=".jpg",
        masks="annotations/validation",
        mask_files=(MaskFiles(".png", reduced_labels),),
        split=None,
    ),
}

_SUFFIXES = (".png", ".PNG")  # of masks of one's own


def find_pictures(config: SegmentationConfig) -> list[MaskedPicture]:
    """Find the pictures of a section's set, with the places of their masks; a picture's own mask may be missing.

    Raises UserError where the files do not lie as the layout wants, or no picture has a mask.
    """
    pictures = _own_pictures(config) if config.dataset is None else _public_pictures(config.dataset, config.data or "")
    return pictures[: config.max_samples]


def _public_pictures(dataset: MaskedSet, given: str) -> list[MaskedPicture]:
    layout = PUBLIC_LAYOUTS[dataset]
    places = f"in it or in {' or '.join(layout.folders)} below it"

    def wrong(what: str) -> UserError:
        return UserError(f"{given}: holds no {dataset}: {what}; expected {layout.tree()}, {places}")

    if not Path(given).is_dir():
        raise wrong("it is no folder")
    roots = [Path(given, folder) for folder in ("", *layout.folders)]
    root = next((root for root in roots if (root / layout.images).is_dir()), None)
    if root is None:
        raise wrong(f"there is no folder {layout.images}")
    if not (root / layout.masks).is_dir():
        raise wrong(f"there is no folder {root / layout.masks}")
    if layout.split is None:
        names = _names_below(root / layout.images, lambda name: name.endswith(layout.image_suffix))
        stems = [name.removesuffix(layout.image_suffix) for name in names]
    else:
        stems = _listed(root / layout.split, wrong)
    if not stems:
        what = layout.split if layout.split else f"{layout.images}/*{layout.image_suffix}"
        raise wrong(f"{root / what} names no picture")
    images = {stem: root / layout.images / f"{stem}{layout.image_suffix}" for stem in stems}
    pictures = [
        MaskedPicture(stem, image, *_mask_of(root / layout.masks / stem, layout.mask_files))
        for stem, image in images.items()
    ]
    _require_a_mask(pictures, wrong)
    return pictures


def _own_pictures(config: SegmentationConfig) -> list[MaskedPicture]:
    images, masks = Path(config.images or ""), Path(config.masks or "")
    for key, folder in (("images", images), ("masks", masks)):
        if not folder.is_dir():
            raise UserError(f"{whole_path(folder)}: no such folder; rule: {key} is a folder")
    if images.samefile(masks):
        raise UserError(f"{masks}: holds the pictures too; rule: pictures and masks lie in two folders")
    names = _names_below(images, is_picture)
    if not names:
        raise UserError(f"{images}: holds no picture; rule: {', '.join(PICTURES)}, in it or below it")
    law = reduced_labels if config.reduce_zero else stored_labels
    kinds = [MaskFiles(suffix, law) for suffix in _SUFFIXES]
    pictures = [MaskedPicture(name, images / name, *_mask_of((masks / name).with_suffix(""), kinds)) for name in names]

    def wrong(what: str) -> UserError:
        rule = "rule: a PNG of the picture's name, in its folder"
        return UserError(f"{masks}: holds no mask of the pictures of {images}: {what}; {rule}")

    _require_a_mask(pictures, wrong)
    return pictures


def lone_masks(config: SegmentationConfig) -> list[str]:
    """Return which masks of a set of one's own have no picture, as paths from the folder of the masks on, sorted."""
    if config.dataset is not None:
        return []
    images, masks = Path(config.images or ""), Path(config.masks or "")
    stems = {os.path.splitext(name)[0] for name in _names_below(images, is_picture)}
    return [name for name in _names_below(masks, _is_mask) if os.path.splitext(name)[0] not in stems]


def pictures_of_one_mask(pictures: Iterable[MaskedPicture]) -> list[list[MaskedPicture]]:
    """Return the pictures that share a mask, such as a.jpg and a.png: each of them counts."""
    of_masks: dict[Path, list[MaskedPicture]] = {}
    for picture in pictures:
        of_masks.setdefault(picture.mask, []).append(picture)
    return [shared for mask, shared in of_masks.items() if len(shared) > 1 and mask.exists()]


def _is_mask(path: str) -> bool:
    return path.endswith(_SUFFIXES) and not os.path.basename(path).startswith(".")


def _mask_of(stem: Path, kinds: Iterable[MaskFiles]) -> tuple[Path, MaskLaw]:
    """Return the mask of the first kind that is there, or of the first kind where none is."""
    masks = [(stem.with_name(f"{stem.name}{kind.suffix}"), kind.law) for kind in kinds]
    return next((mask for mask in masks if mask[0].exists()), masks[0])


def _require_a_mask(pictures: list[MaskedPicture], wrong: Callable[[str], UserError]) -> None:
    if not any(picture.image.exists() and picture.mask.exists() for picture in pictures):
        first = pictures[0].mask if pictures[0].image.exists() else pictures[0].image
        raise wrong(f"of {counted(len(pictures), 'picture')} none is there with its mask, such as {first}")


def _names_below(folder: Path, counts: Callable[[str], bool]) -> list[str]:
    """Return the paths, from a folder on, of the files below it that count, sorted."""

    def found() -> Iterator[str]:
        for place, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if not is_hidden(name)]
            yield from (os.path.relpath(os.path.join(place, name), folder) for name in names)

    return sorted(filter(counts, found()))


def _listed(split: Path, wrong: Callable[[str], UserError]) -> list[str]:
    """Return the names in a split file, each once, in its order."""
    try:
        text = read_regular(split).decode()
    except OSError as error:
        raise wrong(f"{split} cannot be read: {reason_of(error)}") from error
    except UnicodeDecodeError:
        raise wrong(f"{split} holds bytes that are no UTF-8") from None
    return list(dict.fromkeys(name for line in text_lines(text) if (name := line.strip())))
