"""A linear map that keeps its weight by name, not by memory, and on CPUs multiplies in float32 through oneDNN.

torch.nn.functional.linear saves a transposed view of the weight, which holds the weight's memory until the backward,
whatever becomes of the parameter meanwhile. Here the parameter itself is saved: where it is sharded (ZeRO stage 3), it
is gathered for the forward, given up behind it, and gathered again for the backward.

oneDNN's products are faster on CPUs than those that torch takes by itself. It prepares each new number of rows and
keeps that for good: 0.5 to 1 MB for each product was seen, without a bound and whatever
ONEDNN_PRIMITIVE_CACHE_CAPACITY says. So only layers take it that see the same few numbers at every step.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Multiplications below which oneDNN gains nothing. It also prepares each new shape once, for some milliseconds.
LEAST_WORK = 2**27


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, steady: bool = False) -> Tensor:
    """Return x @ weight.T + bias: [T, O], with a graph; differentiable once.

    x: [T, I]; weight: [O, I]; bias: [O] or None. steady: whether T is the same at every step, or one of a few. Numbers
    are torch's own bit for bit where oneDNN is not taken.
    """
    if torch.compiler.is_compiling():  # the compiler has products of its own, which no size may split into graphs
        return functional.linear(x_TI, weight_OI, bias_O)
    output: Tensor = _Linear.apply(x_TI, weight_OI, bias_O, steady)
    return output


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, steady: bool) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        ctx.steady = steady
        return _product(x_TI, weight_OI, bias_O, steady)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_TI, weight_OI = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        return (
            _product(gradient_TO, weight_OI.t(), None, ctx.steady) if for_x else None,
            # oneDNN is no faster here.
            gradient_TO.t() @ x_TI if for_weight else None,
            gradient_TO.sum(0) if for_bias else None,
            None,
        )


def _product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, steady: bool) -> Tensor:
    if steady and _gains(x_TI, weight_OI):
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI.contiguous(), weight_OI, bias_O, "none", [], "")
        return output
    return functional.linear(x_TI, weight_OI, bias_O)


def _gains(x_TI: Tensor, weight_OI: Tensor) -> bool:
    return (
        x_TI.device.type == "cpu"
        and x_TI.dtype == weight_OI.dtype == torch.float32
        and x_TI.dim() == 2
        and x_TI.shape[0] * weight_OI.numel() >= LEAST_WORK
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # what torch.compile uses too, but no public function
    )
