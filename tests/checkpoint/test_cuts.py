"""A checkpoint goes on where the flat groups are cut in another way: fragments have names, not places in groups."""

from pathlib import Path
from unittest.mock import patch

import pytest
from torch import Tensor

from cosmos_scale.checkpoint.state import RunState
from cosmos_scale.checkpoint.writer import CheckpointWriter
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.pair import drawn_pair
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.loss.cosmos_loss import CosmosLoss
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.tiny import GLOBAL_BATCH, Tiny, build_tiny, tiny_config, whole

STEPS = 2  # before the checkpoint, and after it
Outcome = tuple[list[float], dict[tuple[str, int], dict[str, Tensor]], list[int]]


def config_of(stage: int, precision: str) -> RunConfig:
    return tiny_config(zero={"stage": stage}, precision=precision, optimizer={"warmup_steps": 0})


def go_on(tiny: Tiny) -> Outcome:
    losses = [tiny.step(step).total.item() for step in range(STEPS, 2 * STEPS)]
    outcome = losses, tiny.fragments(), [master.numel() for (master,) in tiny.student.layout.masters]
    tiny.close()
    return outcome


def save_in_the_order_of_the_model(rank: int, world_size: int, folder: Path, stage: int, precision: str) -> Outcome:
    config, ranks = config_of(stage, precision), start_ranks("cpu")
    with patch.object(CosmosModel, "image_tower_parameters", return_value=[]):
        tiny = build_tiny(config, ranks, teacher_seed=1)
    for step in range(STEPS):
        tiny.step(step)
    consumed = STEPS * GLOBAL_BATCH
    state = RunState(STEPS, consumed, STEPS, world_size, {}, "digest", config.model_dump(mode="json"))
    with CheckpointWriter(folder, tiny.student.fragments, ranks.control, config.checkpoint) as writer:
        writer.save(state)
    return go_on(tiny)


def resume(rank: int, world_size: int, folder: Path, stage: int, precision: str) -> Outcome:
    pair = drawn_pair(config_of(stage, precision).model_copy(update={"seed": 7}), start_ranks("cpu"))
    pair.restore(folder / f"step-{STEPS:08d}")
    return go_on(Tiny(pair.student, pair.teacher, CosmosLoss("true")))


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16")])
def test_groups_that_are_cut_in_another_way_go_on_bit_for_bit(tmp_path: Path, stage: int, precision: str) -> None:
    saved = run_ranks(save_in_the_order_of_the_model, 2, tmp_path, stage, precision)
    found = run_ranks(resume, 2, tmp_path, stage, precision)
    assert saved[0][2] != found[0][2], "both cut alike"
    assert saved[0][0] == found[0][0]
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        before, after = (whole([fragments for _, fragments, _ in results], kind) for results in (saved, found))
        assert all((before[name] == after[name]).all() for name in before), kind
