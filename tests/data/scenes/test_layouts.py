"""Scenes in the layouts of evaluations: each evaluation finds the pictures of the shards, with what is true of them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosmos_scale.config import ClassificationConfig, SegmentationConfig
from cosmos_scale.data.scenes.layouts import LabelledScene, SceneLayouts, colour_labels, read_scenes, write_layouts
from cosmos_scale.data.scenes.scene_shards import build_scenes
from cosmos_scale.data.scenes.scenes import CLASSES, COLOURS, SIDE
from cosmos_scale.evaluation.datasets.captioned_files import open_coco
from cosmos_scale.evaluation.datasets.labelled_sets import open_labelled_set
from cosmos_scale.evaluation.segmentation.layouts import find_pictures

SCENES = 20


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_scenes(tmp_path_factory.mktemp("scenes"), train=1, gallery=SCENES, seed=3, workers=1).gallery


@pytest.fixture(scope="module")
def layouts(gallery: Path, tmp_path_factory: pytest.TempPathFactory) -> SceneLayouts:
    return write_layouts(gallery, tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def scenes(gallery: Path) -> list[LabelledScene]:
    return list(read_scenes(gallery))


def test_classification_finds_every_scene_with_the_name_of_its_class(
    layouts: SceneLayouts, scenes: list[LabelledScene]
) -> None:
    found = open_labelled_set(ClassificationConfig(kind="classification", data=str(layouts.by_class)))
    assert sorted(name for (name,) in found.names) == sorted(CLASSES)
    named = {
        Path(found.pictures.name(place)).stem: found.names[label][0]
        for place, label in enumerate(found.pictures.labels)
    }
    assert named == {scene.key: scene.attributes["class"] for scene in scenes}
    assert found.templates[0] == "a {}"
    assert len(found.templates) == 5


def test_segmentation_finds_every_scene_with_a_mask_of_colours(
    layouts: SceneLayouts, scenes: list[LabelledScene]
) -> None:
    folder = layouts.segmentation
    section = SegmentationConfig(
        kind="segmentation",
        images=str(folder / "JPEGImages"),
        masks=str(folder / "SegmentationClass"),
        classes=str(folder / "classes.txt"),
        background=True,
    )
    pictures = find_pictures(section)
    assert [Path(picture.name).stem for picture in pictures] == [scene.key for scene in scenes]
    listed = (folder / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    assert listed == [scene.key for scene in scenes]
    titles = [line.split(", ")[0] for line in (folder / "classes.txt").read_text().splitlines()]
    assert titles[1:] == list(COLOURS)
    for picture, scene in zip(pictures, scenes, strict=True):
        labels = picture.law(picture.mask.read_bytes(), SIDE * SIDE)
        assert picture.image.read_bytes() == scene.jpeg
        for item, mask in zip(scene.attributes["objects"], scene.masks, strict=True):
            marked = np.asarray(Image.open(io.BytesIO(mask)))
            assert (labels[marked] == titles.index(item["colour"])).all()
        assert (labels > 0).sum() == sum(np.asarray(Image.open(io.BytesIO(mask))).sum() for mask in scene.masks)
        assert (labels == colour_labels(scene)).all()


def test_captions_belong_to_their_pictures(layouts: SceneLayouts, scenes: list[LabelledScene]) -> None:
    pairs = [(file, list(texts)) for file, texts in open_coco(layouts.captions)]
    assert [Path(file.path).stem for file, _ in pairs] == [scene.key for scene in scenes]
    for (file, texts), scene in zip(pairs, scenes, strict=True):
        assert Path(file.path).read_bytes() == scene.jpeg
        assert texts == [*scene.captions["raw_caption"], *scene.captions["shortIB_captions"]]


def test_layouts_are_a_function_of_the_shards_and_replace_what_was_there(gallery: Path, tmp_path: Path) -> None:
    def contents() -> dict[str, bytes]:
        return {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    write_layouts(gallery, tmp_path)
    first = contents()
    (tmp_path / "by_class" / "black_circle" / "stale.jpg").write_bytes(b"")
    write_layouts(gallery, tmp_path)
    assert contents() == first
    document = json.loads(first["captions/annotations/captions_val2017.json"])
    assert len(document["images"]) == SCENES
