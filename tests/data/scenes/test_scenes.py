"""Generated scenes: what captions say is in the picture, masks mark it, and the splits are what they claim."""

import io
import itertools
import json
import math
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosmos_scale.data.scenes.scene_shards import build_scenes, split_scenes
from cosmos_scale.data.scenes.scenes import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    PLACES,
    SHAPES,
    SIDE,
    SIZES,
    TEXTURES,
    Scene,
    SceneObject,
    captions,
    draw_scene,
    relation,
    render,
)
from cosmos_scale.model.tokenizer import Tokenizer

CONTEXT_OF_DEMO = 32


def scenes(count: int, seed: int) -> list[Scene]:
    generator = np.random.default_rng(seed)
    return [draw_scene(generator) for _ in range(count)]


def pixels_and_masks(scene: Scene, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    picture = render(scene, np.random.default_rng(seed))
    image = np.asarray(Image.open(io.BytesIO(picture.jpeg)), dtype=np.float64)
    return image, [np.asarray(Image.open(io.BytesIO(mask))) for mask in picture.masks]


def test_objects_of_a_scene_can_be_told_apart() -> None:
    sizes = list(SIZES)
    for scene in scenes(500, seed=1):
        main, *others = scene.objects
        assert all(sizes.index(other.size) < sizes.index(main.size) for other in others)
        for attribute in ("colour", "shape", "place"):
            values = [getattr(item, attribute) for item in scene.objects]
            assert len(set(values)) == len(values)
        assert scene.class_name == f"{main.colour} {main.shape}"


def test_every_word_is_drawn() -> None:
    drawn = scenes(3000, seed=2)
    objects = [item for scene in drawn for item in scene.objects]
    assert {scene.background for scene in drawn} == set(BACKGROUNDS)
    for attribute, words in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES), ("texture", TEXTURES)):
        assert {getattr(item, attribute) for item in objects} == set(words)
    assert {scene.class_name for scene in drawn} == set(CLASSES)
    assert {len(scene.objects) for scene in drawn} == {1, 2, 3}


@pytest.mark.parametrize("seed", range(12))
def test_masks_mark_what_the_captions_name(seed: int) -> None:
    """Under an object's mask lie its colour, at its place, in its size; outside of all masks lies the background."""
    scene = scenes(1, seed=100 + seed)[0]
    image, masks = pixels_and_masks(scene, seed)
    assert image.shape == (SIDE, SIDE, 3)
    assert len(masks) == len(scene.objects)
    for item, mask in zip(scene.objects, masks, strict=True):
        rows, columns = np.nonzero(mask)
        x, y = PLACES[item.place]
        # The centre of a box around the shape: its own shift of 0.03 of the side and the triangle's lower centre.
        assert abs((columns.min() + columns.max()) / 2 / SIDE - x) < 0.05
        assert abs((rows.min() + rows.max()) / 2 / SIDE - y) < 0.05
        # Sizes are a factor of 1.3 apart; radii vary by 7 %, and shapes' extents by 12 % around their radius.
        assert (columns.max() - columns.min() + 1) / 2 / SIDE == pytest.approx(SIZES[item.size], rel=0.2)
        inner = mask & np.roll(mask, 2, 0) & np.roll(mask, -2, 0) & np.roll(mask, 2, 1) & np.roll(mask, -2, 1)
        if item.texture == "plain" and inner.any():
            # JPEG and noise of 5 grey levels: the mean over dozens of pixels stays close.
            assert np.abs(image[inner].mean(0) - COLOURS[item.colour]).max() < 30
        brightness = image[inner].mean(-1)
        assert (brightness.std() > 12) == (item.texture != "plain")
    for first, second in itertools.combinations(masks, 2):
        assert not (first & second).any()
    outside = ~np.any(masks, axis=0)
    assert np.abs(image[outside].mean(0) - BACKGROUNDS[scene.background]).max() < 8


def test_relations_follow_the_places() -> None:
    def at(place: str) -> SceneObject:
        return SceneObject("small", "plain", "red", "circle", place)

    assert relation(at("top left"), at("top right")) == "left of"
    assert relation(at("bottom right"), at("top right")) == "below"
    assert relation(at("top right"), at("bottom left")) == "above and right of"


def test_captions_have_the_keys_and_form_of_dreamlip() -> None:
    lengths = Counter[str]()
    for number, scene in enumerate(scenes(100, seed=3)):
        texts = captions(scene, np.random.default_rng(number))
        assert list(texts) == [
            "raw_caption",
            *(f"{length}{model}_captions" for length in ("short", "long") for model in ("IB", "SV", "LLA")),
        ]
        for key, sentences in texts.items():
            assert sentences
            assert not any("." in sentence or sentence != sentence.strip() for sentence in sentences)
            lengths[key] = max(lengths[key], len(sentences))
        assert len(texts["raw_caption"]) == 1
        for item in scene.objects:
            assert f"{item.description} {item.place}" in texts["raw_caption"][0]
        assert scene.background in texts["raw_caption"][0]
        assert not any(" a orange" in f" {sentence}" for sentences in texts.values() for sentence in sentences)
    assert all(lengths[f"long{model}_captions"] >= 3 for model in ("IB", "SV", "LLA"))


def test_gallery_is_held_out_and_distinct() -> None:
    training, gallery = split_scenes(3000, 512, seed=4)
    assert (len(training), len(gallery)) == (3000, 512)
    keys = {scene.attributes for scene in gallery}
    assert len(keys) == 512
    assert not keys & {scene.attributes for scene in training}
    texts = [captions(scene, np.random.default_rng(i))["raw_caption"][0] for i, scene in enumerate(gallery)]
    ids = Tokenizer(77)(texts)
    assert len({tuple(row) for row in ids.tolist()}) == 512
    # The demo's context length must not cut off words that tell scenes apart.
    assert int((ids != 0).sum(1).max()) <= CONTEXT_OF_DEMO


def test_attributes_ignore_the_order_of_objects() -> None:
    scene = next(scene for scene in scenes(50, seed=5) if len(scene.objects) == 3)
    reordered = Scene(scene.background, scene.objects[::-1])
    assert reordered.attributes == scene.attributes
    other = "pink" if scene.background != "pink" else "grey"
    assert Scene(other, scene.objects).attributes != scene.attributes


def test_knowing_only_the_background_or_the_number_of_objects_is_worth_little() -> None:
    """Recall at 1 of a model that sees only some attributes: it guesses within a group, so chance x groups."""
    _, gallery = split_scenes(1, 512, seed=0)

    def times_chance(groups: Sequence[object]) -> float:
        return sum(1 / groups.count(group) for group in groups)

    assert times_chance([scene.background for scene in gallery]) == pytest.approx(len(BACKGROUNDS))
    assert times_chance([(scene.background, len(scene.objects)) for scene in gallery]) == pytest.approx(12)
    assert math.isclose(times_chance([scene.attributes for scene in gallery]), 512)


def read_members(folder: Path) -> dict[str, bytes]:
    members = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as shard:
            for member in shard:
                file = shard.extractfile(member)
                assert file is not None
                members[member.name] = file.read()
    return members


def test_shards_hold_all_members_and_are_a_function_of_the_seed(tmp_path: Path) -> None:
    first = build_scenes(tmp_path / "a", train=140, gallery=5, seed=7, workers=1)
    again = build_scenes(tmp_path / "b", train=140, gallery=5, seed=7, workers=2)
    other = build_scenes(tmp_path / "c", train=140, gallery=5, seed=8, workers=1)
    members = read_members(first.train)
    assert members == read_members(again.train)
    assert read_members(first.gallery) == read_members(again.gallery)
    assert members != read_members(other.train)
    assert len([name for name in members if name.endswith(".jpg")]) == 140
    assert len(list(first.train.glob("*.tar"))) == 2
    scene = json.loads(members["000017.scene.json"])
    assert CLASSES[int(members["000017.cls"])] == scene["class"]
    assert len([name for name in members if name.startswith("000017.mask")]) == len(scene["objects"])
    raw_caption = json.loads(members["000017.json"])["raw_caption"][0]
    assert all(f"{item['colour']} {item['shape']} {item['place']}" in raw_caption for item in scene["objects"])


def test_permuted_captions_belong_to_other_pictures(tmp_path: Path) -> None:
    true = build_scenes(tmp_path / "true", train=40, gallery=10, seed=7)
    permuted = build_scenes(tmp_path / "permuted", train=40, gallery=10, seed=7, permute_captions=True)
    true_members, permuted_members = read_members(true.train), read_members(permuted.train)
    moved = [name for name in true_members if true_members[name] != permuted_members[name]]
    assert {name.split(".", 1)[1] for name in moved} == {"json"}
    assert len(moved) == 40
    assert sorted(true_members[name] for name in moved) == sorted(permuted_members[name] for name in moved)
    assert read_members(true.gallery) == read_members(permuted.gallery)


def test_a_smaller_build_leaves_no_stale_shards(tmp_path: Path) -> None:
    build_scenes(tmp_path, train=129, gallery=5, seed=7)
    shards = build_scenes(tmp_path, train=10, gallery=5, seed=7)
    assert len(list(shards.train.glob("*.tar"))) == 1
