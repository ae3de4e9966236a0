"""Scenes of shards in the layouts that evaluations read: pictures by class, with masks, and with captions.

They show how to lay out one's own pictures:

    by_class/black_circle/000007.jpg             as torchvision's ImageFolder reads it, a folder a class
    by_class/classnames.txt, templates.txt
    segmentation/JPEGImages/000007.jpg           as in PASCAL VOC
    segmentation/SegmentationClass/000007.png    a pixel's value is its class, 0 the background
    segmentation/ImageSets/Segmentation/val.txt  the names, a line each
    segmentation/classes.txt                     a line a class, in the order of the values
    captions/images/val2017/000007.jpg           as in COCO
    captions/annotations/captions_val2017.json
"""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from cosmos_scale.data.scenes.scenes import BACKGROUNDS, CLASSES, COLOURS, SHAPES
from cosmos_scale.files import delete_folder, make_folder

CAPTIONS_OF_SCENES = ("raw_caption", "shortIB_captions")
"""Keys of the captions that say what only one picture of few shows."""


class SceneLayouts(NamedTuple):
    """Folders of the same pictures in three layouts."""

    by_class: Path
    segmentation: Path
    captions: Path


class LabelledScene(NamedTuple):
    """A sample of a shard. key: its name. attributes: as in `.scene.json`. masks: PNG files, one an object."""

    key: str
    jpeg: bytes
    captions: Mapping[str, Sequence[str]]
    attributes: Mapping[str, Any]
    masks: Sequence[bytes]


def read_scenes(shards: Path) -> Iterator[LabelledScene]:
    """Yield the scenes of a folder of shards, in their order."""
    for path in sorted(shards.glob("*.tar")):
        samples: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                key, _, ending = member.name.partition(".")
                file = shard.extractfile(member)
                assert file is not None, "a shard of scenes holds files only"
                samples.setdefault(key, {})[ending] = file.read()
        for key, members in samples.items():
            masks = [members[f"mask{place}.png"] for place in range(len(members)) if f"mask{place}.png" in members]
            yield LabelledScene(
                key, members["jpg"], json.loads(members["json"]), json.loads(members["scene.json"]), masks
            )


def write_layouts(shards: Path, out: Path) -> SceneLayouts:
    """Write the scenes of a folder of shards in every layout below `out`, in place of what was there.

    The bytes are a function of the shards. Raises UserError where a folder cannot be made.
    """
    layouts = SceneLayouts(out / "by_class", out / "segmentation", out / "captions")
    for folder in layouts:
        delete_folder(folder)
        make_folder(folder)
    scenes = list(read_scenes(shards))
    _write_by_class(scenes, layouts.by_class)
    _write_masks(scenes, layouts.segmentation)
    _write_captions(scenes, layouts.captions)
    return layouts


def _write_by_class(scenes: Sequence[LabelledScene], folder: Path) -> None:
    """A folder for each of CLASSES, also one without pictures, so that every run has all classes."""
    names = sorted(CLASSES)
    for name in names:
        make_folder(folder / name.replace(" ", "_"))
    for scene in scenes:
        (folder / scene.attributes["class"].replace(" ", "_") / f"{scene.key}.jpg").write_bytes(scene.jpeg)
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "templates.txt").write_text("".join(f"{template}\n" for template in _templates()))


def _templates() -> Iterator[str]:
    """Sentences in the words of the captions that the model is trained on."""
    yield "a {}"
    yield from (f"a {{}} on a {background} background" for background in BACKGROUNDS)


def _write_masks(scenes: Sequence[LabelledScene], folder: Path) -> None:
    """Pictures, masks of colours, the list of names, and the names of the classes: the background, then COLOURS."""
    pictures, masks, lists = folder / "JPEGImages", folder / "SegmentationClass", folder / "ImageSets" / "Segmentation"
    for place in (pictures, masks, lists):
        make_folder(place)
    for scene in scenes:
        (pictures / f"{scene.key}.jpg").write_bytes(scene.jpeg)
        Image.fromarray(colour_labels(scene)).save(masks / f"{scene.key}.png")
    (lists / "val.txt").write_text("".join(f"{scene.key}\n" for scene in scenes))
    background = [f"a {name} background" for name in BACKGROUNDS] + [f"on {name}" for name in BACKGROUNDS]
    lines = [background, *([colour, *(f"{colour} {shape}" for shape in SHAPES)] for colour in COLOURS)]
    (folder / "classes.txt").write_text("".join(f"{', '.join(names)}\n" for names in lines))


def colour_labels(scene: LabelledScene) -> npt.NDArray[np.uint8]:
    """Return the class of each pixel [H, W]: 0 for the background, then 1 + the place of the object's colour."""
    colours = list(COLOURS)
    labels_HW = np.zeros(Image.open(io.BytesIO(scene.jpeg)).size[::-1], dtype=np.uint8)
    for item, mask in zip(scene.attributes["objects"], scene.masks, strict=True):
        labels_HW[np.asarray(Image.open(io.BytesIO(mask)))] = 1 + colours.index(item["colour"])
    return labels_HW


def _write_captions(scenes: Sequence[LabelledScene], folder: Path) -> None:
    """Pictures, and the captions of all of them in one file, each with the number of its picture."""
    pictures, texts = folder / "images" / "val2017", folder / "annotations"
    for place in (pictures, texts):
        make_folder(place)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes):
        (pictures / f"{scene.key}.jpg").write_bytes(scene.jpeg)
        images.append({"id": number, "file_name": f"{scene.key}.jpg"})
        for key in CAPTIONS_OF_SCENES:
            for text in scene.captions[key]:
                annotations.append({"id": len(annotations), "image_id": number, "caption": text})
    document = {"images": images, "annotations": annotations}
    (texts / "captions_val2017.json").write_text(json.dumps(document, indent=1) + "\n")
