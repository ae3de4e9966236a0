"""Micro-batches and recomputed blocks give the gradients of one batch, at every stage of ZeRO, clipped or not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos_scale.batch import Features
from cosmos_scale.engine.accumulate import surrogate
from cosmos_scale.engine.ranks import Ranks, start_ranks
from cosmos_scale.testing.tiny import GLOBAL_BATCH, build_tiny, tiny_config, whole, worst_difference

# fp32 sums of one batch in another order.
TOLERANCE = 1e-5
CLIP_NORMS = (None, 0.5)


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return start_ranks("cpu")


def gradients(ranks: Ranks, stage: int, clip_norm: float | None, **train: Any) -> dict[str, Tensor]:
    """The first moments after one update: 0.1 of the gradient that the optimizer was given."""
    config = tiny_config(
        zero={"stage": stage},
        train={"global_batch": GLOBAL_BATCH, "schedule_steps": 100} | train,
        optimizer={"warmup_steps": 0, "clip_norm": clip_norm},
    )
    tiny = build_tiny(config, ranks, teacher_seed=1)
    tiny.step(0)
    moments = whole([tiny.fragments()], "exp_avg")
    tiny.close()
    return moments


@pytest.fixture(scope="module")
def expected(ranks: Ranks) -> dict[float | None, dict[str, Tensor]]:
    """Those of the batch, by the norm to which they are clipped."""
    return {clip_norm: gradients(ranks, 0, clip_norm) for clip_norm in CLIP_NORMS}


@pytest.mark.parametrize("clip_norm", CLIP_NORMS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("micro_batches", "recompute"), [(2, 0), (8, 0), (1, 1), (4, 2)])
def test_gradients_of_parts_are_those_of_the_batch(
    ranks: Ranks,
    expected: dict[float | None, dict[str, Tensor]],
    stage: int,
    clip_norm: float | None,
    micro_batches: int,
    recompute: int,
) -> None:
    ours = gradients(ranks, stage, clip_norm, micro_batches=micro_batches, recompute=recompute)
    worst = worst_difference(ours, expected[clip_norm])
    assert worst[0] <= TOLERANCE, worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_surrogate_hands_over_the_gradients_scaled_before_they_are_rounded(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4), (1, 3, 4), (2, 3, 4), (1, 3, 4), (1,), (1,)]
    features = Features(*(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes))
    wanted = Features(*(torch.randn(shape, generator=generator) for shape in shapes))
    scale = torch.tensor(3.0)
    (surrogate(features, wanted) * scale).backward()
    for feature, gradient in zip(features, wanted, strict=True):
        assert feature.grad is not None
        assert torch.equal(feature.grad, (gradient * scale).to(dtype))
