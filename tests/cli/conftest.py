"""A checkpoint of a real run, for the commands that evaluate one."""

from pathlib import Path

import pytest

from cosmos_scale.data.scenes.scene_shards import SceneShards, build_scenes
from cosmos_scale.testing.runs import train_to_end

DEMO = Path(__file__).resolve().parents[2] / "configs" / "run" / "demo.yaml"
SMALL = [
    "name=small",
    "model.vision.layers=1",
    "model.text.layers=1",
    "data.views.local_crops=1",
    "data.captions.count=3",
    "optimizer.warmup_steps=1",
    "train.global_batch=8",
    "train.schedule_steps=2",
    "ema.momentum=0.5",
    "data.workers=0",
    "device=cpu",
]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> SceneShards:
    return build_scenes(tmp_path_factory.mktemp("scenes"), train=16, gallery=40, workers=1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, shards: SceneShards) -> Path:
    """The folder of the checkpoints of steps 0 and 2, by a run that evaluates at step 2."""
    folder = tmp_path_factory.mktemp("run")
    places = [f"output={folder}", f"data.sources.0.shards={shards.train}", f"eval.retrieval.shards={shards.gallery}"]
    train_to_end(DEMO, *SMALL, *places, "eval.every=2").require(0)
    return folder / "small" / "checkpoints"
