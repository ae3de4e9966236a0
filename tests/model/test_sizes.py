"""The shipped sizes have OpenCLIP's towers, and each trains a step at stage 3 of ZeRO."""

from typing import NamedTuple

import open_clip
import pytest
import torch

from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.config.shipped import shipped_file
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.testing.batches import random_batch
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.tiny import build_tiny

OPENCLIP = {
    "merged30m_vitb32": "ViT-B-32",
    "merged30m_vitb16": "ViT-B-16",
    "merged30m_vitl16": "ViT-L-16",
    "merged30m_vitl14": "ViT-L-14",
    "merged30m_vith14": "ViT-H-14",
}
HEADS = ("image_token_mapping.", "text_token_mapping.", "text_attn_cross_pool.", "visual.attn_cross_pool.")
PARAMETERS = {"merged30m_vitl16": 433_848_066, "merged30m_vitl14": 433_725_186, "merged30m_vith14": 996_875_778}


def is_head(name: str) -> bool:
    return name.startswith(HEADS) or name == "distill_logit_scale"


@pytest.mark.parametrize("run", OPENCLIP)
def test_towers_have_openclips_tensors(run: str) -> None:
    config = load_config(shipped_file(run)).model
    sizes = open_clip.get_model_config(OPENCLIP[run])
    with torch.device("meta"):
        ours = CosmosModel(config)
        theirs = open_clip.CLIP(**sizes)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items() if not is_head(name)}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items() if name != "attn_mask"}
    assert config.text.heads == sizes["text_cfg"]["heads"]
    assert config.vision.head_width == sizes["vision_cfg"].get("head_width", 64)
    expected = PARAMETERS.get(run)
    assert expected in (None, sum(parameter.numel() for parameter in ours.parameters()))


def two_layers(run: str) -> RunConfig:
    """The run's widths and crops with two blocks a tower, few words, two samples, at stage 3."""
    smaller = {"zero.stage": 3, "train.global_batch": 2, "train.epochs": 1, "precision": "fp32"}
    smaller |= {"model.vision.layers": 2, "model.text.layers": 2}
    config = load_config(shipped_file(run), [f"{key}={value}" for key, value in smaller.items()])
    text = config.model.text.model_copy(update={"vocab_size": 512})  # the batch's words are no tokenizer's
    return config.model_copy(update={"model": config.model.model_copy(update={"text": text})})


class Step(NamedTuple):
    """What a rank says of its step."""

    loss: float
    gradient_norm: float
    finite: bool


def _step_of_each(rank: int, world_size: int) -> dict[str, Step]:
    ranks, found = start_ranks("cpu"), {}
    for run in PARAMETERS:
        config = two_layers(run)
        tiny = build_tiny(config, ranks)
        batch = random_batch(config.model, config.data.views, 2, [(4, 12)] * config.data.captions.count)
        output = tiny.step(0, batch=batch, lr=1e-4)
        found[run] = Step(float(output.total), float(output.gradient_norm), bool(output.finite))
        tiny.close()
    return found


def test_each_size_trains_at_stage_3() -> None:
    first, second = run_ranks(_step_of_each, 2, timeout=200)
    assert first == second
    assert first.keys() == PARAMETERS.keys()
    for run, step in first.items():
        assert step.finite, run
        assert step.loss > 0, run
        assert step.gradient_norm > 0, run
