"""Features scaled to length 1: few passes, and a backward in closed form."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST_LENGTH = 1e-12
"""Shorter vectors are divided by this length, as torch's own `normalize` does."""


def normalise(features: Tensor) -> Tensor:
    """Scale the last dimension to length 1, computed in float32 at least: squares in float16 could overflow.

    Differentiable once.
    """
    unit: Tensor = _Normalise.apply(features)
    return unit


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        dtype = torch.promote_types(features.dtype, torch.float32)
        length = torch.linalg.vector_norm(features, dim=-1, keepdim=True, dtype=dtype).clamp_min_(LEAST_LENGTH)
        ctx.save_for_backward(features, length)
        unit: Tensor = (features / length).to(features.dtype)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_unit: Tensor) -> Tensor:
        # The part of the gradient along the unit vector would change the length only. So it is taken away, except where
        # the length is LEAST_LENGTH, whatever the features are.
        features, length = ctx.saved_tensors
        unit = features / length
        along = (by_unit * unit).sum(-1, keepdim=True).mul_(length > LEAST_LENGTH)
        by_features: Tensor = (by_unit - unit.mul_(along)).div_(length).to(features.dtype)
        return by_features
