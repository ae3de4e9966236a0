"""The evaluator of segmentation on a small set: its numbers, ranks, broken files, overlays, and what it refuses."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from cosmos_scale.config import SegmentationConfig
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.evaluator import Encoder, Gather, Numbers, measure, one_process
from cosmos_scale.evaluation.kinds import make_evaluator
from cosmos_scale.evaluation.prompts.texts import imagenet_templates
from cosmos_scale.evaluation.segmentation.evaluator import Segmentation, recipe_of
from cosmos_scale.evaluation.segmentation.labels import class_probabilities
from cosmos_scale.evaluation.segmentation.overlays import class_colours, draw_overlay
from cosmos_scale.evaluation.segmentation.segmenter import Recipe
from cosmos_scale.evaluation.text_weights import text_weights
from tests.evaluation.segmentation import oracle
from tests.evaluation.segmentation.golden import golden_encoder, tower_in_float64
from tests.evaluation.segmentation.own_set import LINES, SIZES, OwnSet
from tests.evaluation.thread_ranks import in_threads


@pytest.fixture
def own_set(tmp_path: Path) -> OwnSet:
    return OwnSet(tmp_path / "set")


def measured(section: SegmentationConfig, folder: Path | None = None) -> Numbers:
    encoder = golden_encoder()
    return measure(make_evaluator(section, encoder.setting), encoder, folder=folder)


def in_ranks(section: SegmentationConfig, world: int, folder: Path | None = None) -> list[Numbers]:
    def run(rank: int, gather: Gather) -> Numbers:
        encoder = golden_encoder()
        setting = replace(encoder.setting, rank=rank, world_size=world)
        return measure(make_evaluator(section, setting), Encoder(encoder.model, setting), gather, folder)

    return in_threads(world, run)


def expected(own_set: OwnSet, recipe: Recipe) -> dict[str, Any]:
    """The oracle's figures, in float64 from pictures to IoU."""
    weights, sizes = tower_in_float64()
    names = [line.split(", ") for line in LINES]
    one_each = [(name,) for of_class in names for name in of_class]
    with torch.no_grad():
        queries = text_weights(golden_encoder(), one_each, imagenet_templates(), one_process).double().numpy()
    task = oracle.Task(*recipe[:9], list(map(len, names)))
    predicted = [oracle.segment_in_float64(picture, queries, weights, sizes, task)[1] for picture in own_set.pictures]
    return oracle.mean_iou(own_set.true, predicted, len(names))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"csa": True, "logit_scale": 65.0, "prob_threshold": 0.3, "area_threshold": 0.2},
        {"csa": True, "crop": 0, "short_side": 40},
        {"stride": 7, "pamr_steps": 2, "pamr_dilations": (1, 2)},
    ],
)
def test_numbers_are_the_oracles(own_set: OwnSet, keys: dict[str, Any]) -> None:
    section = own_set.section(per_class=True, **keys)
    numbers, oracles = measured(section), expected(own_set, recipe_of(section, 32))
    # No pixel of these pictures is so near a tie that float32 decides otherwise.
    for name in ("mIoU", "aAcc", "mAcc"):
        assert numbers[name] == pytest.approx(oracles[name], abs=1e-12)
    titles = ["background", "aeroplane", "bird", "person", "cat"]
    assert [numbers[f"IoU_{title}"] for title in titles] == pytest.approx(oracles["iou"], abs=1e-12)
    all_background = oracle.mean_iou(own_set.true, [np.zeros_like(mask) for mask in own_set.true], len(LINES))
    assert numbers["trivial_mIoU"] == pytest.approx(all_background["mIoU"], abs=1e-12)
    assert (numbers["pictures"], numbers["left_out"]) == (5, 0)


def test_a_name_of_two_classes_is_never_decided_by_rounding(own_set: OwnSet) -> None:
    """As "bed" of COCO-Object, which is a name of the background too: both are equally probable, the first counts."""
    (own_set.folder / "names.txt").write_text("sky, cat\naeroplane\ntree, bird\nperson\ncat, bird\n")
    numbers = measured(own_set.section(per_class=True, csa=True, stride=5))
    assert numbers["IoU_cat"] == 0
    encoder = golden_encoder()
    evaluator = make_evaluator(own_set.section(), encoder.setting)
    assert isinstance(evaluator, Segmentation)
    queries = evaluator.queries(encoder, one_process)
    assert queries.places == (0, 1, 2, 3, 4, 5, 1, 4)
    logits = torch.randn(6, 9, 11, generator=torch.Generator().manual_seed(0))
    ours = class_probabilities(logits, 3.0, *queries[1:])
    whole = oracle.softmax(3.0 * logits.double().numpy()[list(queries.places)], 0)
    expected = np.maximum.reduceat(whole, [0, 2, 3, 5, 6], axis=0)
    assert np.abs(ours.numpy() - expected).max() < 1e-6  # rounding of float32


def test_without_background_the_trivial_answer_is_the_most_frequent_class(own_set: OwnSet) -> None:
    numbers = measured(own_set.section(background=False))
    pixels = np.bincount(np.concatenate([mask.ravel() for mask in own_set.true]), minlength=256)[: len(LINES)]
    assert numbers["trivial_mIoU"] == pytest.approx(pixels.max() / pixels.sum() / len(LINES))


def test_numbers_are_the_same_on_any_ranks_and_in_any_batch(own_set: OwnSet, tmp_path: Path) -> None:
    section = own_set.section(csa=True, per_class=True, overlays=3)
    alone = measured(section, tmp_path / "1")
    assert measured(own_set.section(csa=True, per_class=True, batch=1)) == alone
    for world in (2, 3, 7):
        assert in_ranks(section, world, tmp_path / str(world)) == [alone] * world
    drawn = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("1", "2", "3", "7")]
    assert drawn == [["00000-0.png.png", "00001-1.png.png", "00002-2.png.png"]] * 4


def test_broken_files_cost_a_picture_each_and_are_named(own_set: OwnSet, capsys: pytest.CaptureFixture[str]) -> None:
    images, masks = own_set.folder / "images", own_set.folder / "masks"
    (images / "0.png").write_bytes((images / "0.png").read_bytes()[:-200])
    (masks / "1.png").unlink()
    Image.fromarray(np.full((33, 64), 5, dtype=np.uint8)).save(masks / "2.png")
    Image.fromarray(np.zeros((33, 64), dtype=np.uint8)).save(masks / "3.png")
    encoder = golden_encoder()
    evaluator = make_evaluator(own_set.section(), encoder.setting)
    alone = measure(evaluator, encoder)
    assert measure(evaluator, encoder) == alone  # another model: nothing is named again
    assert (alone["pictures"], alone["left_out"]) == (1, 4)
    lines = capsys.readouterr().err.splitlines()
    said = [
        "left out: 0.png of .*: the picture does not decode",
        r"left out: 1.png of .*: .*masks/1\.png cannot be read: No such file",
        "left out: 2.png of .*: the mask holds label 5, but the classes are 0 to 4",
        "left out: 3.png of .*: the mask has 64 x 33 pixels, the picture, turned upright, 33 x 64",
    ]
    assert len(lines) == len(said)
    for line, wanted in zip(lines, said, strict=True):
        assert re.match(wanted, line), line
    assert in_ranks(own_set.section(), 2) == [alone] * 2


def test_classes_of_other_masks_are_refused_before_anything_is_measured(own_set: OwnSet) -> None:
    (own_set.folder / "names.txt").write_text("\n".join(LINES[:3]) + "\n")
    said = r"names.txt: has 3 classes, 0 to 2, but 5 of 5 masks looked at hold greater labels, such as 4 in .*"
    with pytest.raises(UserError, match=said + r"masks/4\.png; rule: a class for each label"):
        make_evaluator(own_set.section(), golden_encoder().setting)


def test_sets_without_a_label_that_counts_are_refused(own_set: OwnSet) -> None:
    for place, (height, width) in enumerate(SIZES):
        Image.fromarray(np.full((height, width), 255, dtype=np.uint8)).save(own_set.folder / "masks" / f"{place}.png")
    with pytest.raises(UserError, match="no pixel of 5 pictures has a label that counts"):
        measured(own_set.section())


def test_ranks_that_see_other_files_are_refused(own_set: OwnSet) -> None:
    setting = golden_encoder().setting
    before = make_evaluator(own_set.section(), setting).gallery()
    assert before == make_evaluator(own_set.section(), setting).gallery()
    (own_set.folder / "masks" / "4.png").unlink()
    assert make_evaluator(own_set.section(), setting).gallery() != before
    assert make_evaluator(own_set.section(), setting).gallery().startswith("5 pictures, 5 classes, digest ")


def test_overlays_show_the_true_and_the_predicted_labels(own_set: OwnSet, tmp_path: Path) -> None:
    measured(own_set.section(overlays=1), tmp_path / "drawn")
    (path,) = (tmp_path / "drawn").iterdir()
    with Image.open(path) as sheet:
        assert sheet.mode == "RGB"
        assert sheet.width > 3 * 420
    measured(own_set.section(overlays=0), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_table_has_the_trivial_answer_and_lone_masks_beside_the_models(own_set: OwnSet) -> None:
    (own_set.folder / "masks" / "lone.png").write_bytes(b"")
    setting, encoder = golden_encoder().setting, golden_encoder()
    evaluator = make_evaluator(own_set.section(per_class=True), setting)
    numbers = measure(evaluator, encoder)
    console = Console(width=100, file=io.StringIO())
    console.print(evaluator.table({"student": numbers, "teacher": numbers}, "step 5"))
    for detail in evaluator.details():
        console.print(detail)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "mIoU of all background" in printed
    assert "5 pictures; 1 mask without a picture, such as lone.png" in printed
    assert f"{100 * numbers['mIoU']:.2f} %" in printed
    assert f"{100 * numbers['trivial_mIoU']:.2f} %" in printed
    assert f"{100 * numbers['IoU_bird']:.2f} %" in printed
    assert json.loads(json.dumps(numbers)) == numbers


def test_names_must_fit_the_set(own_set: OwnSet, tmp_path: Path) -> None:
    root = tmp_path / "voc"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("a\n")
    (root / "JPEGImages/a.jpg").write_bytes(b"")
    (root / "SegmentationClass/a.png").write_bytes(b"")
    setting = golden_encoder().setting
    public = SegmentationConfig(kind="segmentation", dataset="voc20", data=str(root), classes=own_set.section().classes)
    with pytest.raises(UserError, match="names 5 classes, but voc20 has 20; rule: a line a class"):
        make_evaluator(public, setting)
    many = tmp_path / "many.txt"
    many.write_text("".join(f"thing {number}\n" for number in range(256)))
    with pytest.raises(UserError, match="names 256 classes; rule: at most 255"):
        make_evaluator(own_set.section(classes=str(many)), setting)


@pytest.mark.parametrize(
    ("dataset", "size", "expected"),
    [
        ("voc20", 224, Recipe(336, 224, 112)),
        ("voc21", 224, Recipe(336, 224, 112, logit_scale=65, prob_threshold=0.1, area_threshold=0.1)),
        ("context60", 224, Recipe(336, 224, 112, logit_scale=50, prob_threshold=0.1)),
        ("coco_object", 224, Recipe(336, 224, 112, logit_scale=50, prob_threshold=0.1)),
        ("coco_stuff", 224, Recipe(448, 224, 112)),
        ("cityscapes", 224, Recipe(560, 224, 112)),
        ("ade20k", 224, Recipe(336, 224, 112)),
        ("ade20k", 64, Recipe(96, 64, 32)),
    ],
)
def test_public_sets_are_segmented_as_published(dataset: Any, size: int, expected: Recipe) -> None:
    assert recipe_of(SegmentationConfig(kind="segmentation", dataset=dataset, data="x"), size) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "images: None must be given where dataset is null"),
        ({"images": "a", "masks": "b"}, "classes: None must be given"),
        ({"dataset": "voc20"}, "data: None must be given: the folder that holds voc20"),
        ({"data": "x", "images": "a", "masks": "b", "classes": "c"}, "data: x needs dataset"),
        ({"dataset": "voc20", "data": "x", "images": "a"}, "images: a is for a set of one's own, not voc20"),
        ({"dataset": "voc20", "data": "x", "background": True}, "background: True is for a set of one's own"),
        ({"dataset": "voc20", "data": "x", "prob_threshold": 0.1}, "must be 0 where class 0 is no background"),
        ({"images": "a", "masks": "b", "classes": "c", "area_threshold": 0.1}, "must be 0 where class 0 is no"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationConfig.model_validate({"kind": "segmentation", **keys})


def test_colours_tell_classes_apart() -> None:
    colours = class_colours(150, background=True)
    assert colours[0].tolist() == [51, 51, 51]
    assert len({tuple(colour) for colour in colours.tolist()}) == 150
    # Neighbours in the list, which a set often has side by side, differ most.
    assert np.abs(np.diff(colours.astype(int), axis=0)).max(1).min() > 60


def test_overlays_of_any_size_show_each_label_in_its_colour(tmp_path: Path) -> None:
    for height, width in ((3, 5), (30, 1200), (900, 40)):
        pixels = np.full((height, width, 3), 100, dtype=np.uint8)
        true = np.zeros((height, width), dtype=np.uint8)
        true[:, width // 2 :] = 255
        predicted = np.ones_like(true)
        draw_overlay(tmp_path / "one.png", pixels, true, predicted, ["background", "thing"])
        with Image.open(tmp_path / "one.png") as sheet:
            found = {colour for _, colour in sheet.getcolors(1 << 24) or [] if isinstance(colour, tuple)}
        thing = class_colours(2, background=True)[1]
        for colour in ([51, 51, 51], [255, 255, 255], thing.tolist()):
            shown = tuple(int(0.4 * 100 + 0.6 * part) for part in colour)
            near = [other for other in found if max(abs(a - b) for a, b in zip(other, shown, strict=True)) <= 1]
            assert near, (colour, shown)  # within one level: how Pillow rounds a blend


def test_pictures_of_one_mask_are_named(own_set: OwnSet, capsys: pytest.CaptureFixture[str]) -> None:
    images = own_set.folder / "images"
    for name in ("1.jpg", "3.JPEG", "alone.png", "alone.jpg"):
        Image.fromarray(own_set.pictures[1]).convert("RGB").save(images / name)
    setting = golden_encoder().setting
    make_evaluator(own_set.section(), setting)
    assert capsys.readouterr().err == (
        f"doubtful pictures: {images}: 2 masks with several pictures, such as 1.png with 1.jpg and 1.png, each of "
        "which counts; rule: a picture for each mask\n"
    )
    make_evaluator(own_set.section(), replace(setting, rank=1, world_size=2))
    make_evaluator(own_set.section(max_samples=2), setting)
    assert capsys.readouterr().err == ""


def test_masks_in_black_and_white_are_doubtful(own_set: OwnSet, capsys: pytest.CaptureFixture[str]) -> None:
    masks = own_set.folder / "masks"
    for place, (height, width) in enumerate(SIZES):
        white = np.zeros((height, width), dtype=np.uint8)
        white[3:9, 3:9] = 255
        Image.fromarray(white).save(masks / f"{place}.png")
    setting = golden_encoder().setting
    make_evaluator(own_set.section(), setting)
    said = capsys.readouterr().err
    assert said.startswith(
        f"doubtful masks: {masks}: 0 and 255 alone in 5 masks looked at, and pixels of 255 count nowhere;"
    )
    assert said.endswith("rule: 0 to 4 are the classes, such as 1 for 'aeroplane'\n")
    assert said.count("\n") == 1
    Image.fromarray(np.ones(SIZES[4], dtype=np.uint8)).save(masks / "4.png")
    make_evaluator(own_set.section(), setting)
    assert capsys.readouterr().err == ""
