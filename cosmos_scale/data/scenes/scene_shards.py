"""A small dataset of generated scenes as indexed webdataset shards: training pairs and a held-out gallery.

A sample's members: `.jpg`, `.json` (captions), and for later evaluations, which the trainer does not read, `.cls` (the
class as a number), `.scene.json` (attributes and class name) and one `.mask<n>.png` per object.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cosmos_scale.data.jobs import map_jobs, progress_bar
from cosmos_scale.data.scenes.scenes import CLASSES, Scene, captions, draw_scene, render
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.files import make_folder, regular_only

SAMPLES_PER_SHARD = 128

# Streams of one seed: attributes of either split, and the pictures and captions of each sample.
_DRAW_GALLERY, _DRAW_TRAINING, _PERMUTATION = 0, 1, 2
_SAMPLES = {"gallery": 3, "train": 4}


class SceneShards(NamedTuple):
    """Folders of indexed shards."""

    train: Path
    gallery: Path


def split_scenes(train: int, gallery: int, seed: int) -> tuple[list[Scene], list[Scene]]:
    """Draw training scenes and gallery scenes. Gallery scenes are distinct, and no gallery scene occurs in training.

    Scenes are compared by their attributes. Returns (training scenes, gallery scenes).
    """
    generator = np.random.default_rng([seed, _DRAW_GALLERY])
    held_out: dict[object, Scene] = {}
    while len(held_out) < gallery:
        scene = draw_scene(generator)
        held_out.setdefault(scene.attributes, scene)
    generator = np.random.default_rng([seed, _DRAW_TRAINING])
    training: list[Scene] = []
    while len(training) < train:
        scene = draw_scene(generator)
        if scene.attributes not in held_out:
            training.append(scene)
    return training, list(held_out.values())


def build_scenes(
    out: Path,
    *,
    train: int,
    gallery: int,
    seed: int = 0,
    permute_captions: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> SceneShards:
    """Write and index the shards of `train` training samples and `gallery` held-out samples under `out`.

    The bytes are a function of the sizes, the seed and `permute_captions`. workers: processes; None: one per core.
    permute_captions: give each training picture the captions of another picture (a control that must learn nothing);
    gallery pictures keep their own captions.
    """
    training_scenes, gallery_scenes = split_scenes(train, gallery, seed)
    described = list(range(train))
    if permute_captions:
        # Each picture takes the captions of its successor on one random cycle, so that no picture keeps its own.
        cycle = np.random.default_rng([seed, _PERMUTATION]).permutation(train)
        for picture, text in zip(cycle, np.roll(cycle, -1), strict=True):
            described[picture] = int(text)
    jobs = [
        *_shard_jobs(out / "train", "train", training_scenes, described, seed),
        *_shard_jobs(out / "gallery", "gallery", gallery_scenes, list(range(gallery)), seed),
    ]
    for folder in (out / "train", out / "gallery"):
        make_folder(folder)
        for stale in folder.glob("*.tar"):
            stale.unlink()
    with progress_bar("painting scenes", train + gallery, show=progress) as advance:
        for samples in map_jobs(_write_shard, jobs, workers):
            advance(samples)
    for folder in (out / "train", out / "gallery"):
        index_shards(str(folder), None, workers=workers, progress=False)
    return SceneShards(out / "train", out / "gallery")


class _Sample(NamedTuple):
    scene: Scene
    text: Scene
    picture_stream: tuple[int, int, int]
    text_stream: tuple[int, int, int]


class _ShardJob(NamedTuple):
    path: Path
    first: int
    samples: tuple[_Sample, ...]


def _shard_jobs(folder: Path, split: str, scenes: list[Scene], described: list[int], seed: int) -> Iterator[_ShardJob]:
    stream = _SAMPLES[split]
    for number, first in enumerate(range(0, len(scenes), SAMPLES_PER_SHARD)):
        samples = tuple(
            _Sample(scenes[i], scenes[described[i]], (seed, stream, i), (seed, stream, described[i]))
            for i in range(first, min(first + SAMPLES_PER_SHARD, len(scenes)))
        )
        yield _ShardJob(folder / f"{split}-{number:05d}.tar", first, samples)


def _write_shard(job: _ShardJob) -> int:
    with (
        open(job.path, "wb", opener=regular_only) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as shard,
    ):
        for number, sample in enumerate(job.samples, start=job.first):
            for extension, content in _members(sample):
                # The member's time stays 0, so that equal runs write equal bytes.
                member = tarfile.TarInfo(f"{number:06d}.{extension}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return len(job.samples)


def _members(sample: _Sample) -> Iterator[tuple[str, bytes]]:
    scene = sample.scene
    picture = render(scene, np.random.default_rng([*sample.picture_stream, 0]))
    texts = captions(sample.text, np.random.default_rng([*sample.text_stream, 1]))
    attributes = {
        "class": scene.class_name,
        "background": scene.background,
        "objects": [item._asdict() for item in scene.objects],
    }
    yield "jpg", picture.jpeg
    yield "json", json.dumps(texts).encode()
    yield "cls", str(CLASSES.index(scene.class_name)).encode()
    yield "scene.json", json.dumps(attributes).encode()
    for index, mask in enumerate(picture.masks):
        yield f"mask{index}.png", mask
