"""The exact GELU in pieces of few sizes, so that a CPU's memory does not grow from step to step.

On CPUs torch computes GELU of float32 and of bfloat16 through oneDNN. oneDNN prepares code for each new size, and keeps
the code of the last 1,024 sizes. The number of packed caption tokens is another at each step, so each step would leave
some hundred small allocations behind. They take little memory themselves. But they lie between the step's large
tensors, and the freed memory between them no longer fits the next step's tensors: the process grew by 20 MiB a step.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cosmos_scale.kernels.serving import like_gpu

SMALLEST_PIECE = 8  # rows: fewer are one piece, since a call takes longer than so few rows
IN_PIECES = (torch.float32, torch.bfloat16)


def gelu_in_pieces(x_TW: Tensor, *, steady: bool = False) -> Tensor:
    """Return the exact GELU, bit for bit that of torch.nn.functional.gelu, of x's dtype; differentiable once.

    x: [T, W]. On a CPU T is cut into powers of two and a rest below SMALLEST_PIECE: so all T up to a million come to
    24 sizes. Elsewhere, and for other dtypes, the whole is one piece. steady: whether T is the same at every step, or
    one of a few numbers: the whole is one piece then too.
    """
    if steady or torch.compiler.is_compiling() or like_gpu(x_TW.device) or not _is_cut(x_TW):
        return functional.gelu(x_TW)
    active_TW: Tensor = _GeluInPieces.apply(x_TW)
    return active_TW


def piece_sizes(rows: int) -> list[int]:
    """Return the sizes of a number of rows' pieces: falling powers of two, then the rest below SMALLEST_PIECE."""
    rest = rows % SMALLEST_PIECE
    powers = [1 << bit for bit in reversed(range(rows.bit_length())) if (rows - rest) >> bit & 1]
    return powers + [rest] * (rest > 0)


def _is_cut(x_TW: Tensor) -> bool:
    return x_TW.device.type == "cpu" and x_TW.dtype in IN_PIECES and x_TW.dim() == 2 and x_TW.is_contiguous()


class _GeluInPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TW: Tensor) -> Tensor:
        ctx.save_for_backward(x_TW)
        active_TW = torch.empty_like(x_TW)
        sizes = piece_sizes(x_TW.shape[0])
        for part, active in zip(x_TW.split(sizes), active_TW.split(sizes), strict=True):
            torch.ops.aten.gelu.out(part, out=active)
        return active_TW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_TW: Tensor) -> Tensor:
        (x_TW,) = ctx.saved_tensors
        gradient_TW = torch.empty_like(x_TW)
        sizes = piece_sizes(x_TW.shape[0])
        parts = (tensor.split(sizes) for tensor in (upstream_TW.contiguous(), x_TW, gradient_TW))
        for upstream, part, gradient in zip(*parts, strict=True):
            torch.ops.aten.gelu_backward.grad_input(upstream, part, grad_input=gradient)
        return gradient_TW
