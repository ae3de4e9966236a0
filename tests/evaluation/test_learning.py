"""Training on scenes teaches retrieval, and training on permuted captions does not: the numbers mean what they say."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from cosmos_scale.checkpoint import load_weights, newest, read_run_config
from cosmos_scale.config import SourceConfig
from cosmos_scale.data.scenes.scene_shards import SceneShards, build_scenes
from cosmos_scale.data.shards.index import open_sources
from cosmos_scale.evaluation.gallery import Gallery
from cosmos_scale.evaluation.retrieval import encoded_together, ranked
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.testing.runs import train_to_end

DEMO = Path(__file__).resolve().parents[2] / "configs" / "run" / "demo.yaml"

# The demo with half its blocks, few of its views and captions, and a quarter of its steps.
TEST_SIZED = [
    "name=control",
    "model.vision.layers=2",
    "model.text.layers=2",
    "train.schedule_steps=30",
    "data.views.local_crops=1",
    "data.captions.count=3",
    "optimizer.lr=2e-3",
    "optimizer.warmup_steps=8",
    "checkpoint.at_start=false",
    "eval.every=0",
    "data.workers=0",
    "device=cpu",
]
GROUP = 64


def checkpoint_of(folder: Path, shards: SceneShards) -> Path:
    """Train on shards; return the last checkpoint."""
    train_to_end(DEMO, *TEST_SIZED, f"output={folder}", f"data.sources.0.shards={shards.train}").require(0)
    checkpoint = newest(folder / "control" / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def times_chance(checkpoint: Path, shards: SceneShards) -> tuple[float, float]:
    """R@1 of both directions as multiples of chance, the mean over galleries of 64.

    One gallery of 512 would not do: guessing right once or thrice in 512 is a matter of luck. In eight galleries of 64,
    a guess is right 8 times on average, and 24 times with a probability below 1e-5.
    """
    config = read_run_config(checkpoint)
    model = CosmosModel(config.model)
    model.load_state_dict(load_weights(checkpoint, "student"))
    tokenizer = Tokenizer(config.model.text.context_length)

    def encode_texts(texts: Sequence[str]) -> torch.Tensor:
        return model.encode_text(tokenizer(texts))

    index = open_sources([SourceConfig(name="gallery", shards=str(shards.gallery))])
    image_size, max_pixels = config.model.vision.image_size, config.data.max_pixels
    gallery = Gallery(index, "raw_caption", image_size=image_size, max_pixels=max_pixels)
    results = [
        ranked(encoded_together(model.encode_image, encode_texts, [batch])) for batch in gallery.batches(0, 1, GROUP)
    ]
    assert [result.images for result in results] == [GROUP] * 8
    images = sum(result.image_to_text.recalls[1] for result in results) / len(results)
    texts = sum(result.text_to_image.recalls[1] for result in results) / len(results)
    return GROUP * images, GROUP * texts


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_true_captions_teach_and_permuted_captions_do_not(tmp_path: Path) -> None:
    reached = {}
    for name, permute in (("true", False), ("permuted", True)):
        shards = build_scenes(tmp_path / name, train=960, gallery=512, permute_captions=permute)
        reached[name] = times_chance(checkpoint_of(tmp_path / name, shards), shards)
    # Measured: 12 times chance in both directions, and 0.8 and 0.6 with permuted captions.
    assert min(reached["true"]) > 6
    assert max(reached["permuted"]) < 3
