"""A linear map that saves the parameter itself for the backward, and on CPUs multiplies in float32 through oneDNN.

torch.nn.functional.linear saves a transposed view of the weight. The view holds the weight's memory until the backward,
even where the parameter was given other memory meanwhile. This map saves the parameter. So a sharded parameter (ZeRO
stage 3) can be gathered for the forward, released after it, and gathered again for the backward.

On CPUs oneDNN multiplies faster than what torch uses by itself. But oneDNN prepares code for each new number of rows
and keeps it for good: 0.5 to 1 MB for each product was seen, without a bound and whatever
ONEDNN_PRIMITIVE_CACHE_CAPACITY says. So oneDNN serves only layers that see the same few numbers of rows at every step.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cosmos_scale.kernels.serving import like_gpu

# With fewer multiplications oneDNN is no faster. It also prepares each new shape once, which takes some milliseconds.
LEAST_WORK = 2**27


def linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    steady: bool = False,
    sum_bias: bool = True,
) -> Tensor:
    """Return x @ weight.T + bias: [T, O], with a graph; differentiable once.

    x: [T, I]; weight: [O, I]; bias: [O] or None. steady: whether T is the same at every step, or one of a few numbers.
    sum_bias: whether the backward forms the bias's gradient; False where a function of `pointwise.py` does.
    Where oneDNN is not used, results equal those of torch.nn.functional.linear bit for bit.
    """
    if torch.compiler.is_compiling():  # the compiler chooses products itself; a branch on sizes would split its graph
        return functional.linear(x_TI, weight_OI, bias_O)
    output: Tensor = _Linear.apply(x_TI, weight_OI, bias_O, steady, sum_bias)
    return output


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, steady: bool, sum_bias: bool
    ) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        ctx.steady = steady
        ctx.sum_bias = sum_bias
        return _product(x_TI, weight_OI, bias_O, steady)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x_TI, weight_OI = ctx.saved_tensors
        for_x, for_weight, for_bias, *_ = ctx.needs_input_grad
        return (
            _product(gradient_TO, weight_OI.t(), None, ctx.steady) if for_x else None,
            # oneDNN is no faster for this product.
            gradient_TO.t() @ x_TI if for_weight else None,
            gradient_TO.sum(0) if for_bias and ctx.sum_bias else None,
            None,
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
        and not like_gpu(x_TI.device)
        and x_TI.dtype == weight_OI.dtype == torch.float32
        and x_TI.dim() == 2
        and x_TI.shape[0] * weight_OI.numel() >= LEAST_WORK
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # torch.compile uses it too, but it is not public
    )
