"""What a transformer block does beside products and attention, with the Triton kernels' backward passes.

Three functions for tensors that the kernels serve (`serving.py`). Each takes over the gradient of a bias which a linear
map has added already: the sum over rows that the bias needs is formed where these rows are in the GPU's registers
anyway. The linear map is then asked not to sum (`linear.py`). The bias itself is not read here, and may be gathered for
the linear map alone; None means that nobody needs its gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def add_norm(
    x: Tensor,
    update: Tensor | None,
    bias_D: Tensor | None,
    gain_D: Tensor,
    offset_D: Tensor,
    eps: float,
    values: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return x + update and its layer norm over the last dimension; without update, x itself and its layer norm.

    x, update: [..., D] of one dtype; gain, offset: [D]. bias: [D] that is part of update. values: gain and offset with
    more digits, which are read in their place; the gradients go to gain and offset. Differentiable once.
    """
    values = values or (gain_D, offset_D)
    total, normed = _AddNorm.apply(x, update, bias_D, gain_D, offset_D, *values, eps, torch.is_grad_enabled())
    return total, normed


def gelu(x_TW: Tensor, bias_W: Tensor | None) -> Tensor:
    """Return the exact GELU; bias: [W] that is part of x. Differentiable once."""
    active: Tensor = _Gelu.apply(x_TW, bias_W)
    return active


def split_stacked(stacked_TW: Tensor, bias_W: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut [T, 3 D] into queries, keys and values, [T, H, D / H] each; bias: [3 D] that is part of `stacked`.

    Where attention's backward leaves the three gradients side by side, they are not copied. Differentiable once.
    """
    queries, keys, values = _SplitStacked.apply(stacked_TW, bias_W, heads)
    return queries, keys, values


def side_by_side(parts_TD: Sequence[Tensor]) -> Tensor | None:
    """Return the matrix [T, parts D] whose columns the parts [T, D] are, one after the other; None: there is none."""
    first, width, row = parts_TD[0], parts_TD[0].shape[1], len(parts_TD) * parts_TD[0].shape[1]
    for number, part in enumerate(parts_TD):
        same = part.untyped_storage()._cdata == first.untyped_storage()._cdata
        place = first.storage_offset() + number * width
        if not same or part.stride() != (row, 1) or part.storage_offset() != place:
            return None
    return first.as_strided((first.shape[0], row), (row, 1))


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        update: Tensor | None,
        bias: Tensor | None,
        gain: Tensor,
        offset: Tensor,
        gain_values: Tensor,
        offset_values: Tensor,
        eps: float,
        has_backward: bool,
    ) -> tuple[Tensor, Tensor]:
        from cosmos_scale.kernels import triton_norm  # here: triton is there on Linux with a GPU build of torch only

        ctx.set_materialize_grads(False)
        saves = has_backward and any(ctx.needs_input_grad)
        rows = x.contiguous().flatten(0, -2)
        added = None if update is None else update.contiguous().flatten(0, -2)
        normed, *others = triton_norm.add_norm_forward(rows, added, gain_values, offset_values, eps, saves)
        total = rows if added is None else others.pop()
        if saves:
            ctx.save_for_backward(total, *others, gain_values)
            ctx.gain_dtype = gain.dtype
            ctx.bias_dtype = None if bias is None else bias.dtype
            ctx.adds = update is not None
        return (x if update is None else total.view_as(x)), normed.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor) -> tuple[Tensor | None, ...]:
        from cosmos_scale.kernels import triton_norm

        total, mean, rstd, gain = ctx.saved_tensors
        joined = None if d_total is None else d_total.contiguous().view_as(total)
        gradient, d_gain, d_offset, *d_bias = triton_norm.add_norm_backward(
            d_normed.contiguous().view_as(total), joined, total, mean, rstd, gain, ctx.gain_dtype, ctx.bias_dtype
        )
        gradient = gradient.view_as(d_normed)
        for_update, for_bias = gradient if ctx.adds else None, d_bias[0] if d_bias else None
        return gradient, for_update, for_bias, d_gain, d_offset, None, None, None, None


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TW: Tensor, bias_W: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TW)
        ctx.bias_dtype = x_TW.dtype if bias_W is None else bias_W.dtype
        return functional.gelu(x_TW)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_TW: Tensor) -> tuple[Tensor, Tensor | None]:
        from cosmos_scale.kernels import triton_bias

        (x_TW,) = ctx.saved_tensors
        gradient_TW, sum_W = triton_bias.gelu_bias_backward(upstream_TW.contiguous(), x_TW, ctx.bias_dtype)
        return gradient_TW, sum_W if ctx.needs_input_grad[1] else None


class _SplitStacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stacked_TW: Tensor, bias_W: Tensor | None, heads: int) -> tuple[Tensor, ...]:
        ctx.bias_dtype = stacked_TW.dtype if bias_W is None else bias_W.dtype
        return tuple(stacked_TW.unflatten(-1, (3, heads, -1)).unbind(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients_THD: Tensor) -> tuple[Tensor, Tensor | None, None]:
        from cosmos_scale.kernels import triton_bias

        parts = [gradient.flatten(1) for gradient in gradients_THD]
        stacked_TW = side_by_side(parts)
        if stacked_TW is None:
            parts = [part.contiguous() for part in parts]
        queries, keys, values = parts
        sum_W, *copied = triton_bias.stack_gradients(queries, keys, values, ctx.bias_dtype, stacked_TW is None)
        return copied[0] if stacked_TW is None else stacked_TW, sum_W if ctx.needs_input_grad[1] else None, None
