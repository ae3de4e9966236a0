"""Where public sets' files lie, in which order their pictures come, and what is said of wrong layouts."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosmos_scale.config import SegmentationConfig
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.segmentation.layouts import MaskedPicture, find_pictures, lone_masks
from cosmos_scale.evaluation.segmentation.masks import (
    cityscapes_labels,
    coco_object_labels,
    coco_stuff_labels,
    reduced_labels,
    stored_labels,
)
from cosmos_scale.set_names import MaskedSet
from tests.evaluation.segmentation.own_set import OwnSet


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def public(dataset: MaskedSet, root: Path) -> list[MaskedPicture]:
    return find_pictures(SegmentationConfig(kind="segmentation", dataset=dataset, data=str(root)))


def names_of(pictures: Sequence[MaskedPicture]) -> list[str]:
    return [picture.name for picture in pictures]


def voc(root: Path, masks: str = "SegmentationClass", split: str = "Segmentation") -> Path:
    touch(root, *(f"JPEGImages/{name}.jpg" for name in "abcd"), *(f"{masks}/{name}.png" for name in "abc"))
    touch(root, f"ImageSets/{split}/val.txt")
    (root / f"ImageSets/{split}/val.txt").write_text("c\na \n\nb\n")
    return root


@pytest.mark.parametrize("folder", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_takes_the_split_in_its_order(tmp_path: Path, folder: str) -> None:
    voc(tmp_path / folder)
    for dataset, law in (("voc20", reduced_labels), ("voc21", stored_labels)):
        pictures = public(dataset, tmp_path)  # type: ignore[arg-type]
        assert names_of(pictures) == ["c", "a", "b"]
        assert pictures[0].image == tmp_path / folder / "JPEGImages/c.jpg"
        assert pictures[0].mask == tmp_path / folder / "SegmentationClass/c.png"
        assert {picture.law for picture in pictures} == {law}


def test_context_has_masks_and_a_split_of_its_own(tmp_path: Path) -> None:
    voc(tmp_path / "VOC2010", "SegmentationClassContext", "SegmentationContext")
    assert public("context59", tmp_path)[0].law is reduced_labels
    pictures = public("context60", tmp_path)
    assert names_of(pictures) == ["c", "a", "b"]
    assert pictures[0].law is stored_labels
    assert pictures[0].mask.parent.name == "SegmentationClassContext"


def test_coco_takes_converted_masks_where_there_are_any(tmp_path: Path) -> None:
    annotations = tmp_path / "coco_stuff164k/annotations/val2017"
    touch(tmp_path / "coco_stuff164k/images/val2017", "2.jpg", "1.jpg", "3.jpg")
    touch(annotations, "1.png", "2.png", "3.png", "2_labelTrainIds.png", "3_instanceTrainIds.png")
    stuff, objects = public("coco_stuff", tmp_path), public("coco_object", tmp_path)
    assert names_of(stuff) == names_of(objects) == ["1", "2", "3"]
    assert [picture.law for picture in stuff] == [coco_stuff_labels, stored_labels, coco_stuff_labels]
    assert [picture.law for picture in objects] == [coco_object_labels, coco_object_labels, stored_labels]
    assert [picture.mask.name for picture in stuff] == ["1.png", "2_labelTrainIds.png", "3.png"]


def test_cityscapes_lie_in_folders_of_cities_and_draws_polygons(tmp_path: Path) -> None:
    touch(tmp_path, *(f"leftImg8bit/val/{name}_leftImg8bit.png" for name in ("munster/1", "lindau/2", "lindau/1")))
    touch(tmp_path, "gtFine/val/munster/1_gtFine_labelTrainIds.png", "gtFine/val/munster/1_gtFine_polygons.json")
    touch(tmp_path, "gtFine/val/lindau/1_gtFine_polygons.json", "gtFine/val/lindau/1_gtFine_color.png")
    pictures = public("cityscapes", tmp_path)
    assert names_of(pictures) == ["lindau/1", "lindau/2", "munster/1"]
    assert [picture.law for picture in pictures] == [cityscapes_labels, stored_labels, stored_labels]
    assert not pictures[1].mask.exists()  # which costs that picture, and is said when it is its turn


def test_ade20k_takes_all_pictures_sorted(tmp_path: Path) -> None:
    folder = tmp_path / "ADEChallengeData2016"
    touch(folder, *(f"images/validation/{name}.jpg" for name in ("v2", "v1", "v10")), "images/validation/notes.txt")
    touch(folder, *(f"annotations/validation/{name}.png" for name in ("v2", "v1", "v10")))
    pictures = public("ade20k", tmp_path)
    assert names_of(pictures) == ["v1", "v10", "v2"]
    assert pictures[0].law is reduced_labels


def test_own_pictures_of_any_form_are_found(tmp_path: Path) -> None:
    own = OwnSet(tmp_path)
    (tmp_path / "images/0.png").rename(tmp_path / "images/0.PNG")
    (tmp_path / "images/1.png").rename(tmp_path / "images/1.heic")
    (tmp_path / "images/.hidden").mkdir()
    (tmp_path / "images/.hidden/2.png").write_bytes(b"x")
    found = find_pictures(own.section())
    assert [picture.name for picture in found] == ["0.PNG", "1.heic", "2.png", "3.png", "4.png"]


def test_own_pictures_find_masks_of_their_names_in_their_folders(tmp_path: Path) -> None:
    touch(tmp_path / "photos", "b.jpg", "more/a.PNG", "c.webp", "notes.txt", "d.e.jpeg")
    touch(tmp_path / "masks", "b.png", "more/a.PNG", "d.e.png")
    keys = {"images": str(tmp_path / "photos"), "masks": str(tmp_path / "masks"), "classes": "names.txt"}
    section = SegmentationConfig(kind="segmentation", **keys)
    pictures = find_pictures(section)
    assert names_of(pictures) == ["b.jpg", "c.webp", "d.e.jpeg", "more/a.PNG"]
    assert lone_masks(section) == []
    touch(tmp_path / "masks", "more/b.png", "lone.png", "lone.txt", ".hidden.png")
    assert lone_masks(section.model_copy(update={"max_samples": 1})) == ["lone.png", "more/b.png"]
    assert [picture.mask.exists() for picture in pictures] == [True, False, True, True]
    assert pictures[2].mask == tmp_path / "masks/d.e.png"
    assert pictures[0].law is stored_labels
    assert find_pictures(section.model_copy(update={"reduce_zero": True}))[0].law is reduced_labels
    assert names_of(find_pictures(section.model_copy(update={"max_samples": 2}))) == ["b.jpg", "c.webp"]
    Image.fromarray(np.zeros((2, 2), dtype=np.uint8)).save(tmp_path / "photos/x.png")
    same = section.model_copy(update={"masks": keys["images"]})
    with pytest.raises(UserError, match="holds the pictures too; rule: pictures and masks lie in two folders"):
        find_pictures(same)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("", "holds no voc20: it is no folder; expected JPEGImages/"),
        ("JPEGImages", "there is no folder JPEGImages; expected JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/"),
        ("SegmentationClass", "there is no folder .*/SegmentationClass; expected"),
        ("ImageSets", "val.txt cannot be read: No such file or directory; expected"),
        ("JPEGImages/*", "of 3 pictures none is there with its mask, such as .*JPEGImages/c.jpg; expected"),
        (
            "SegmentationClass/*",
            "none is there with its mask, such as .*SegmentationClass/c.png; expected .* below it$",
        ),
    ],
)
def test_what_is_missing_is_named_with_what_is_expected(tmp_path: Path, missing: str, message: str) -> None:
    root = voc(tmp_path / "100%" / "voc")
    for path in root.parent.glob(f"voc/{missing}") if missing else [root]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=message.replace("*.", r"\*\.")) as caught:
        public("voc20", root)
    assert "\n" not in str(caught.value)
    assert str(root) in str(caught.value)


def test_an_empty_split_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    (voc(tmp_path) / "ImageSets/Segmentation/val.txt").write_text("\n")
    with pytest.raises(UserError, match=r"val\.txt names no picture; expected"):
        public("voc20", tmp_path)
    touch(tmp_path / "ade", "images/validation/x.png", "annotations/validation/x.png")
    with pytest.raises(UserError, match=r"images/validation/\*\.jpg names no picture"):
        public("ade20k", tmp_path / "ade")
