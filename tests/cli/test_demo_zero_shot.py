"""The demo's last part on a checkpoint that has learned nothing: numbers beside chance, and pictures."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cosmos_scale.data.scenes.layouts import read_scenes, write_layouts
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.data.scenes.scenes import CLASSES
from cosmos_scale.demo_zero_shot import show_zero_shot

SCENES, PATCHES = 3, 8  # 64 pixels in patches of 8


def test_every_number_stands_beside_chance_and_pictures_are_drawn(
    checkpoints: Path, shards: SceneShards, tmp_path: Path
) -> None:
    layouts = write_layouts(shards.gallery, tmp_path / "layouts")
    said = io.StringIO()
    found = show_zero_shot(
        checkpoints / "step-00000002", ("student",), shards.gallery, layouts, tmp_path, SCENES, Console(file=said)
    )
    classification, segmentation, attention = (
        found.numbers[kind]["student"] for kind in ("classification", "segmentation", "attention")
    )
    assert (classification["pictures"], classification["classes"]) == (40, len(CLASSES))
    assert classification["chance_top1"] == 1 / len(CLASSES)
    assert segmentation["pictures"] == SCENES
    assert 0.0 < segmentation["trivial_mIoU"] < 0.15
    for text in ("chance top-1: 2.08 %", "mIoU of all background", "chance: "):
        assert text in said.getvalue()

    # The middles of 8 x 8 patches of a mask of 128 pixels, by places instead of by numpy's grid.
    side = 128 // PATCHES
    masks = [np.asarray(Image.open(io.BytesIO(scene.masks[0]))) for scene in read_scenes(shards.gallery)][:SCENES]
    middles = [[mask[side * r + side // 2, side * c + side // 2] for r in range(8) for c in range(8)] for mask in masks]
    assert attention["chance_peak"] == pytest.approx(np.mean(middles), abs=1e-12)
    for name in ("peak", "peak_other_name"):
        assert attention[name] in [hits / SCENES for hits in range(SCENES + 1)]
    assert 0.0 < attention["weight"] < 1.0
    assert len(list((tmp_path / "segmentation").glob("*.png"))) == SCENES
    assert len(list((tmp_path / "attention").glob("*.png"))) == SCENES
    assert all(path.exists() for path in found.pictures.values())
