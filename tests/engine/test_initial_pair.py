"""Student and teacher from OpenCLIP's towers: the same weights at every stage and number of ranks, and they train."""

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cosmos_scale.checkpoint.interchange.names import is_of_heads, tensor_shapes
from cosmos_scale.checkpoint.interchange.resize import resize_tables
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.pair import initial_pair
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.loss.cosmos_loss import CosmosLoss
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.tiny import GLOBAL_BATCH, Tiny, tiny_config, whole

STAGES = (0, 1, 2, 3)
SEED = 5


def run_config(path: Path, stage: int) -> RunConfig:
    """A run from the file, with QuickGELU; half of the stages recompute."""
    train = {"global_batch": GLOBAL_BATCH, "schedule_steps": 100, "recompute": stage % 2}
    model = tiny_config().model.model_copy(update={"activation": "quick_gelu"}).model_dump()
    start = {"init_from": path, "init_heads": "new", "seed": SEED}
    return tiny_config(model=model, train=train, zero={"stage": stage}, **start)


class Trained(NamedTuple):
    """A rank's first fragments, and the loss of a step."""

    fragments: dict[tuple[str, int], dict[str, Tensor]]
    loss: float


def trained(rank: int, world_size: int, path: Path) -> list[Trained]:
    """Start at every stage, and take a step."""
    found = []
    for stage in STAGES:
        config = run_config(path, stage)
        pair, _ = initial_pair(config, start_ranks("cpu"))
        tiny = Tiny(pair.student, pair.teacher, CosmosLoss(config.optimizer.gradient_scale))
        fragments = tiny.fragments()
        found.append(Trained(fragments, tiny.step(0).total.item()))
        tiny.close()
    return found


def drawn(config: RunConfig, seed: int) -> dict[str, Tensor]:
    model = CosmosModel(config.model)
    model.init_weights(torch.Generator().manual_seed(seed))
    return dict(model.state_dict())


def test_towers_of_another_size_at_every_stage_and_number_of_ranks(tmp_path: Path) -> None:
    path = tmp_path / "quickgelu.pt"
    config = run_config(path, 0)
    theirs = config.model.model_copy(
        update={
            "vision": config.model.vision.model_copy(update={"image_size": 48}),
            "text": config.model.text.model_copy(update={"context_length": 20}),
        }
    )
    towers = drawn(config.model_copy(update={"model": theirs}), 3)
    towers = {name: tensor for name, tensor in towers.items() if not is_of_heads(name)}
    torch.save({f"module.{name}": tensor for name, tensor in towers.items()}, path)
    heads = {name: tensor for name, tensor in drawn(config, SEED).items() if is_of_heads(name)}
    expected = heads | resize_tables(towers, tensor_shapes(config.model))
    losses = []
    for world_size in (1, 2):
        for by_rank in zip(*run_ranks(trained, world_size, path), strict=True):
            for kind in ("weight", "ema"):
                found = whole([rank.fragments for rank in by_rank], kind)
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[name], expected[name].flatten()) for name in found), kind
            losses.append(by_rank[0].loss)
    assert math.isfinite(losses[0])
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)  # float32, sums in other orders
