"""`cosmos-scale eval all` on a checkpoint of a real run: sets found and not found, sets that fail, ranks, files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cosmos_scale.cli import main as cli
from cosmos_scale.data.scenes.layouts import read_scenes, write_layouts
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.evaluation.all_sets import PUBLIC_PLACES
from cosmos_scale.testing.runs import start_command

DATASETS = 23
CITY_PICTURES = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, shards: SceneShards) -> Path:
    """COCO captions and Cityscapes, both of scenes; pets without files; Flickr30k whose pictures are all broken."""
    root = tmp_path_factory.mktemp("sets")
    layouts = write_layouts(shards.gallery, tmp_path_factory.mktemp("layouts"))
    shutil.move(layouts.captions, root / "coco")
    for place, scene in enumerate(read_scenes(shards.gallery)):
        if place < CITY_PICTURES:
            images, masks = (root / "cityscapes" / part / "val" / "ulm" for part in ("leftImg8bit", "gtFine"))
            images.mkdir(parents=True, exist_ok=True)
            masks.mkdir(parents=True, exist_ok=True)
            picture = layouts.segmentation / "JPEGImages" / f"{scene.key}.jpg"
            Image.open(picture).save(images / f"{scene.key}_leftImg8bit.png")
            mask = layouts.segmentation / "SegmentationClass" / f"{scene.key}.png"
            shutil.copy(mask, masks / f"{scene.key}_gtFine_labelTrainIds.png")
    (root / "oxford-iiit-pet").mkdir()
    (root / "flickr30k-images").mkdir()
    (root / "flickr30k-images" / "1.jpg").write_bytes(b"no picture")
    pairs = [{"image": "flickr30k-images/1.jpg", "caption": ["a", "b"]}]
    (root / "flickr30k").mkdir()
    (root / "flickr30k" / "flickr30k_val.json").write_text(json.dumps(pairs))
    return root


def command(checkpoints: Path, root: Path, out: Path, *options: str) -> list[str]:
    data = ["--checkpoint", str(checkpoints), "--data-root", str(root), "--out", str(out)]
    return ["eval", "all", *data, "--device", "cpu", *options]


def read_all(out: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return document


@pytest.fixture(scope="module")
def evaluated(checkpoints: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    options = ("--published", "merged30m_vitb16", "--cache")
    assert cli.main(command(checkpoints, root, out, *options)) == 2  # two sets fail
    return out


def test_found_sets_are_measured_and_the_others_named_with_their_layout(evaluated: Path) -> None:
    document = read_all(evaluated)
    measured = [(one["weights"], one["set"]) for one in document["results"]]
    sets = ["coco_val2017", "cityscapes", "cityscapes-csa"]
    assert measured == [(which, title) for which in ("student", "teacher") for title in sets]
    assert set(document["failed"]) == {"pets", "flickr30k_val, student", "flickr30k_val, teacher"}
    assert "oxford-iiit-pet/annotations/test.txt" in document["failed"]["pets"]
    assert len(document["not_found"]) == DATASETS - 4
    assert "food-101/meta/test.json" in document["not_found"]["food101"]
    assert f"cityscapes: {CITY_PICTURES} pictures used, of 500 of the whole set" in document["notes"]
    assert any("amp" in note for note in document["notes"])


def test_numbers_stand_beside_published_ones(evaluated: Path) -> None:
    document = read_all(evaluated)
    compared = {(row["title"], row["number"], row["weights"]): row for row in document["comparison"]}
    recalls = [("coco_val2017", f"{way}_R@1") for way in ("image_to_text", "text_to_image")]
    expected = {(*recall, which) for recall in recalls for which in ("student", "teacher")}
    # The published mIoU is the teacher's, and may be with or without CSA.
    expected |= {(title, "mIoU", "teacher") for title in ("cityscapes", "cityscapes-csa")}
    assert set(compared) == expected
    student = next(one for one in document["results"] if (one["weights"], one["set"]) == ("student", "coco_val2017"))
    row = compared["coco_val2017", "image_to_text_R@1", "student"]
    assert row["measured"] == 100 * student["image_to_text_R@1"]
    assert (row["published"], row["difference"]) == (68.0, row["measured"] - 68.0)
    table = (evaluated / "evaluation.md").read_text()
    assert f"| coco_val2017 | image_to_text_R@1 | student | {row['measured']:.2f} |  | 68.00 | " in table
    assert "- pets: " in table
    assert "- food101: expected food-101/meta/test.json" in table


def test_ranks_of_a_launcher_write_the_same(checkpoints: Path, root: Path, evaluated: Path, tmp_path: Path) -> None:
    options = ("--published", "merged30m_vitb16")
    with start_command(*command(checkpoints, root, tmp_path, *options), ranks=3) as process:
        process.wait().require(2)  # two sets fail
    document, alone = read_all(tmp_path), read_all(evaluated)
    assert document["results"] == alone["results"]
    assert document["comparison"] == alone["comparison"]
    assert document["not_found"] == alone["not_found"]
    assert set(document["failed"]) == set(alone["failed"])


def test_an_earlier_evaluation_is_kept(
    checkpoints: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of another checkpoint: --out has a default, and the numbers took hours."""
    shutil.copytree(root / "coco", tmp_path / "data" / "coco")
    out = tmp_path / "out"
    out.mkdir()
    before = {f"evaluation{suffix}": b"of another run" for suffix in (".json", ".md", ".1.json", ".1.md")}
    for name, content in before.items():
        (out / name).write_bytes(content + name.encode())
    assert cli.main(command(checkpoints, tmp_path / "data", out, "--weights", "student")) == 0
    assert f"--out: {out} holds an earlier evaluation, which is kept as evaluation.2.json" in capsys.readouterr().err
    assert [one["weights"] for one in read_all(out)["results"]] == ["student"]
    assert (out / "evaluation.2.json").read_bytes() == b"of another runevaluation.json"
    assert (out / "evaluation.2.md").read_bytes() == b"of another runevaluation.md"
    assert (out / "evaluation.1.json").read_bytes() == b"of another runevaluation.1.json"
    assert len(list(out.iterdir())) == 6
    assert cli.main(command(checkpoints, tmp_path, out)) == 2  # nothing is measured: everything stays
    assert len(list(out.iterdir())) == 6


@pytest.mark.parametrize(
    ("place", "options", "said"),
    [
        ("empty", ["--published", "laion"], "--published: laion is none of cc3m_vitb16, "),
        ("nowhere", [], "nowhere is no folder"),
        ("empty", [], f"holds none of the {DATASETS} sets (coco_val2017, "),
    ],
)
def test_what_cannot_be_is_told_in_a_line(
    place: str, options: list[str], said: str, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.main(command(checkpoints, tmp_path / place, tmp_path / "out", *options)) == 2
    errors = capsys.readouterr().err
    *layouts, refusal = errors.splitlines()
    assert said in refusal
    # Where nothing is found the layouts are what the user needs: a line a set.
    expected = [place for place in PUBLIC_PLACES if not place.csa] if "holds none" in said else []
    assert layouts == [f"not found: {place.dataset}; expected: {place.expected}" for place in expected]
