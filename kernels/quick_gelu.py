"""QuickGELU, x * sigmoid(1.702 x): the activation of OpenAI's CLIP, by torch's operators alone.

The autograd function keeps its input alone for the backward, as GELU does. Torch's own graph of the formula would keep
two tensors of that size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SLOPE = 1.702  # the slope with which sigmoid(SLOPE * x) is near the normal distribution function


def quick_gelu(x: Tensor) -> Tensor:
    """Return x * sigmoid(1.702 x), of x's shape and dtype, on any device. Differentiable once."""
    active: Tensor = _QuickGelu.apply(x)
    return active


class _QuickGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (SLOPE * x).sigmoid_().mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # x * sigmoid(a x) = silu(a x) / a, whose derivative is that of silu at a x.
        gradient: Tensor = torch.ops.aten.silu_backward(upstream, SLOPE * x)
        return gradient
