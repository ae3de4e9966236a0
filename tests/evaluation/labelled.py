"""Labelled pictures in every layout, and a tiny model to classify them."""

import io
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_scale.config import ClassificationConfig, RetrievalConfig, RunConfig
from cosmos_scale.evaluation.datasets.captioned_sets import open_captioned
from cosmos_scale.evaluation.evaluator import Encoder, Setting
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.testing.shard_files import picture, write_shard

CPU = torch.device("cpu")
ANIMALS = ("bird", "blue_whale", "cat", "dog", "fox", "gnu", "hen")


def tiny_run(max_pixels: int = 10**6) -> RunConfig:
    """A run whose model has towers of one block and pictures of 16 pixels."""
    vision = {"width": 64, "layers": 1, "image_size": 16, "patch_size": 8}
    text = {"width": 64, "layers": 1, "heads": 1, "context_length": 16}
    return RunConfig.model_validate(
        {
            "model": {"vision": vision, "text": text, "embed_dim": 64, "pooler_heads": 1},
            "data": {"max_pixels": max_pixels},
        }
    )


def tiny_encoder(rank: int = 0, world_size: int = 1, **setting: Any) -> Encoder:
    """Drawn weights, the same each time; all encoders share them."""
    return Encoder(_model(), Setting.of_run(tiny_run(**setting), rank, world_size, CPU))


@lru_cache(maxsize=1)
def _model() -> CosmosModel:
    model = CosmosModel(tiny_run().model)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def section(data: Path, **keys: Any) -> ClassificationConfig:
    """The section of an evaluator of labelled pictures."""
    return ClassificationConfig(kind="classification", data=str(data), **keys)


def write_folders(root: Path, counts: Sequence[int], classes: Sequence[str] = ANIMALS) -> Path:
    """Write so many pictures of noise to a folder of each class."""
    number = 0
    for name, count in zip(classes, counts, strict=False):
        (root / name).mkdir(parents=True)
        for _ in range(count):
            (root / name / f"{number:03d}.jpg").write_bytes(picture(number, size=(24 + number % 5, 20)))
            number += 1
    return root


def write_labelled_shards(root: Path, counts: Sequence[int], classes: Sequence[str] = ANIMALS) -> Path:
    """Write shards as clip-benchmark reads them: test/N.tar with so many samples each, labels in turn."""
    (root / "test").mkdir(parents=True)
    number = 0
    for shard, count in enumerate(counts):
        samples = [
            {"__key__": f"s{place:04d}", "jpg": picture(place), "cls": str(place % len(classes)).encode()}
            for place in range(number, number + count)
        ]
        write_shard(root / "test" / f"{shard}.tar", samples)
        number += count
    (root / "test" / "nshards.txt").write_text(str(len(counts)))
    (root / "classnames.txt").write_text("".join(f"{name}\n" for name in classes))
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na drawing of the {c}.\n")
    return root


def save_picture(path: Path, number: int) -> None:
    """Write a picture of noise, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(number))


def saver(root: Path) -> Callable[[str], None]:
    """Return what writes a picture of noise below a folder, another one each time."""
    written: list[str] = []

    def save(name: str) -> None:
        save_picture(root / name, len(written))
        written.append(name)

    return save


def noise(number: int, side: int = 32) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An array of noise: [side, side, 3] uint8."""
    return np.asarray(Image.open(io.BytesIO(picture(number, "PNG", (side, side)))).convert("RGB"))


def said_of_captions(section: RetrievalConfig, capsys: pytest.CaptureFixture[str]) -> str:
    """What rank 0 says when it opens a set; nothing is said by other ranks, nor where the section names the key."""
    open_captioned(section, tiny_encoder().setting)
    said = capsys.readouterr().err
    open_captioned(section, tiny_encoder(1, 2).setting)
    open_captioned(section.model_copy(update={"captions": "caption"}), tiny_encoder().setting)
    assert capsys.readouterr().err == ""
    return said
