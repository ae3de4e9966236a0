"""A linear map that keeps its weight by name, not by memory, for the backward."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def linear(x_TD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias, of x [T, D], weight [E, D] and bias [E], with torch's own numbers in both directions.

    torch.nn.functional.linear saves a transposed view of the weight, which holds the weight's memory until the
    backward, whatever becomes of the parameter meanwhile. Here the parameter itself is saved: where it is sharded (ZeRO
    stage 3), it is gathered for the forward, given up behind it, and gathered again for the backward.
    """
    output: Tensor = _Linear.apply(x_TD, weight, bias)
    return output


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TD, weight)
        return functional.linear(x_TD, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient_TE: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_TD, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            gradient_TE @ weight if for_x else None,
            gradient_TE.t() @ x_TD if for_weight else None,
            gradient_TE.sum(0) if for_bias else None,
        )
