"""The fused AdamW and average against their formulas in float64."""

import pytest
import torch
from torch import Tensor

from cosmos_scale.kernels.adamw_ema import adamw_ema_, average_, clamp_
from cosmos_scale.testing.tolerances import tolerance

SIZES = [(1,), (7,), (33, 5), (4097,)]
TOLERANCE = tolerance("adamw_ema by torch", torch.float32)
LR, BETAS, EPS, DECAY, MOMENTUM = 1e-2, (0.9, 0.98), 1e-8, 0.5, 0.9


def draw(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in SIZES]


def oracle(steps: int, average_first: bool) -> tuple[list[Tensor], list[Tensor]]:
    """AdamW with decoupled decay (Loshchilov and Hutter) and the average, step by step in float64."""
    weights, averages = [t.double() for t in draw(0)], [t.double() for t in draw(1)]
    first = [torch.zeros_like(t) for t in weights]
    second = [torch.zeros_like(t) for t in weights]
    for step in range(1, steps + 1):
        for i, gradient in enumerate(draw(100 + step)):
            if average_first:
                averages[i] = MOMENTUM * averages[i] + (1 - MOMENTUM) * weights[i]
            first[i] = BETAS[0] * first[i] + (1 - BETAS[0]) * gradient.double()
            second[i] = BETAS[1] * second[i] + (1 - BETAS[1]) * gradient.double() ** 2
            unbiased = first[i] / (1 - BETAS[0] ** step), second[i] / (1 - BETAS[1] ** step)
            weights[i] = weights[i] - LR * (unbiased[0] / (unbiased[1].sqrt() + EPS) + DECAY * weights[i])
            if not average_first:
                averages[i] = MOMENTUM * averages[i] + (1 - MOMENTUM) * weights[i]
    return weights, averages


class State:
    def __init__(self) -> None:
        self.weights, self.averages = draw(0), draw(1)
        self.first = [torch.zeros_like(t) for t in self.weights]
        self.second = [torch.zeros_like(t) for t in self.weights]
        self.steps = [torch.zeros(()) for _ in self.weights]

    def update(self, gradients: list[Tensor], *, average_first: bool, skip: float) -> None:
        adamw_ema_(
            self.weights,
            gradients,
            self.first,
            self.second,
            self.averages,
            self.steps,
            lr=LR,
            betas=BETAS,
            eps=EPS,
            weight_decay=DECAY,
            momentum=MOMENTUM,
            average_first=average_first,
            skip=torch.tensor(skip),
        )

    def tensors(self) -> list[Tensor]:
        lists = [self.weights, self.first, self.second, self.averages, self.steps]
        return [tensor.clone() for tensors in lists for tensor in tensors]


@pytest.mark.parametrize("average_first", [True, False])
def test_updates_follow_the_formulas(average_first: bool) -> None:
    state = State()
    for step in range(1, 6):
        state.update(draw(100 + step), average_first=average_first, skip=0.0)
    weights, averages = oracle(5, average_first)
    for ours, theirs in zip(state.weights + state.averages, weights + averages, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=TOLERANCE, rtol=TOLERANCE)
    assert all(step == 5 for step in state.steps)


@pytest.mark.parametrize("average_first", [True, False])
def test_a_skipped_update_changes_no_bit_whatever_the_gradient(average_first: bool) -> None:
    state = State()
    state.update(draw(5), average_first=average_first, skip=0.0)
    before = state.tensors()
    state.update([torch.full(size, torch.nan) for size in SIZES], average_first=average_first, skip=1.0)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(state.tensors(), before, strict=True))


def test_average_alone() -> None:
    averages, weights = draw(1), draw(0)
    average_(averages, weights, 0.75, torch.zeros(()))
    for ours, average, weight in zip(averages, draw(1), weights, strict=True):
        torch.testing.assert_close(
            ours.double(), 0.75 * average.double() + 0.25 * weight.double(), atol=TOLERANCE / 10, rtol=TOLERANCE
        )


def test_clamp() -> None:
    tensors = draw(0)
    clamp_(tensors, -0.5, 0.25)
    assert all(torch.equal(ours, before.clamp(-0.5, 0.25)) for ours, before in zip(tensors, draw(0), strict=True))
