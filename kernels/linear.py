"""Linear layers: on CPUs in float32 through oneDNN, whose products are faster than those that torch takes by itself.

oneDNN prepares each new number of rows and keeps that for good: 0.5 to 1 MB for each product was seen, without a bound
and whatever ONEDNN_PRIMITIVE_CACHE_CAPACITY says. So only layers take it that see the same few numbers at every step.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Multiplications below which oneDNN gains nothing.
LEAST_WORK = 2**27


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, steady: bool = False) -> Tensor:
    """Return x @ weight.T + bias: [T, O], with a graph; twice differentiable only below LEAST_WORK or off CPUs.

    x: [T, I]; weight: [O, I]; bias: [O] or None. steady: whether T is the same at every step, or one of a few.
    """
    if steady and _gains(x_TI, weight_OI):
        output: Tensor = _OneDnnLinear.apply(x_TI, weight_OI, bias_O)
        return output
    return functional.linear(x_TI, weight_OI, bias_O)


def _gains(x_TI: Tensor, weight_OI: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()  # first: a compiled graph would be bound to one side of LEAST_WORK
        and x_TI.device.type == "cpu"
        and x_TI.dtype == weight_OI.dtype == torch.float32
        and x_TI.dim() == 2
        and x_TI.shape[0] * weight_OI.numel() >= LEAST_WORK
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # what torch.compile uses too, but no public function
    )


class _OneDnnLinear(torch.autograd.Function):
    """The weight's gradient stays torch's own product, which is as fast there."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        return _product(x_TI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_TI, weight_OI = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _product(gradient_TO, weight_OI.t(), None) if for_x else None,
            gradient_TO.t() @ x_TI if for_weight else None,
            gradient_TO.sum(0) if for_bias else None,
        )


def _product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI.contiguous(), weight_OI, bias_O, "none", [], "")
    return output
