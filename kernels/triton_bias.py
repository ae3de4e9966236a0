"""Backward passes that write a gradient and sum it over the rows at once, as Triton kernels: a bias needs this sum.

`gelu_bias_backward` is of the exact GELU behind the wide projection of an MLP. `stack_gradients` puts the gradients of
queries, keys and values side by side, as the stacked projection's products want them. Sums are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos_scale.kernels.operators import operator
from cosmos_scale.kernels.triton_sums import PROGRAMS, SCRATCH_BYTES, WARPS, Tiling, empty_sums, sum_partials, tile

ELEMENTS = 4096  # of a tile
MOST_COLUMNS = 512


@triton.jit
def gelu_backward_kernel(
    upstream,  # [T, W]
    x,  # [T, W]
    result,  # [T, W]
    partials,  # [chunks, 1, W] float32
    T,
    chunk,  # rows of a program
    W: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Form upstream * d gelu(x) / dx for a chunk of rows and a block of columns, and its sum over these rows."""
    program = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    begin = program * chunk
    end = tl.minimum(begin + chunk, T)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        exists = (row < end)[:, None] & (column < W)[None, :]
        place = row.to(tl.int64)[:, None] * W + column[None, :]
        value = tl.load(x + place, mask=exists, other=0.0).to(tl.float32)
        gradient = tl.load(upstream + place, mask=exists, other=0.0).to(tl.float32)
        cumulative = 0.5 + 0.5 * tl.erf(value * 0.7071067811865476)  # of the standard normal
        density = 0.3989422804014327 * tl.exp(-0.5 * value * value)
        gradient *= cumulative + value * density
        tl.store(result + place, gradient.to(result.dtype.element_ty), mask=exists)
        total += gradient
    tl.store(partials + program * W + column, tl.sum(total, 0), mask=column < W)


@triton.jit
def stack_gradients_kernel(
    first,  # [T, D] each, rows STRIDE elements apart
    second,
    third,
    result,  # [T, 3, D], only with STORES
    partials,  # [chunks, 1, 3 D] float32
    T,
    chunk,  # rows of a program
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STORES: tl.constexpr,
):
    """Copy one of three gradients beside the others for a chunk of rows and a block of columns, and sum these rows."""
    BLOCKS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    program, part = tl.program_id(0), tl.program_id(1) // BLOCKS
    column = tl.program_id(1) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    source = first
    if part == 1:
        source = second
    elif part == 2:
        source = third
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    begin = program * chunk
    end = tl.minimum(begin + chunk, T)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        exists = (row < end)[:, None] & (column < D)[None, :]
        wide_row = row.to(tl.int64)[:, None]
        value = tl.load(source + wide_row * STRIDE + column[None, :], mask=exists, other=0.0)
        if STORES:
            tl.store(result + (wide_row * 3 + part) * D + column[None, :], value, mask=exists)
        total += value.to(tl.float32)
    tl.store(partials + (program * 3 + part) * D + column, tl.sum(total, 0), mask=column < D)


def columns_tiling(rows: int, width: int, matrices: int = 1) -> Tiling:
    """Return how rows and columns of some matrices of one width are dealt out: a program takes a block of columns."""
    divisor = width & -width  # blocks that divide the width need no mask
    columns = min(MOST_COLUMNS, divisor if divisor >= 64 else triton.next_power_of_2(width))
    programs = max(1, PROGRAMS // (matrices * triton.cdiv(width, columns)))
    return tile(rows, columns, ELEMENTS, programs)


def _fake_gelu(upstream: Tensor, x: Tensor, bias_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[1], dtype=bias_dtype)


@operator("gelu_bias_backward", _fake_gelu)
def gelu_bias_backward(upstream: Tensor, x: Tensor, bias_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the gradient of x [T, W], where upstream [T, W] is that of the exact gelu(x), and its sum over rows [W].

    upstream, x: contiguous. bias_dtype: of the sum.
    """
    T, W = x.shape
    rows, columns, chunk, programs = columns_tiling(T, W)
    result = torch.empty_like(x)
    partials = x.new_empty((programs, 1, W), dtype=torch.float32)
    gelu_backward_kernel[(programs, triton.cdiv(W, columns))](
        *(upstream, x, result, partials, T, chunk), W=W, ROWS=rows, COLUMNS=columns, num_warps=WARPS
    )
    (summed,) = sum_partials(partials, [bias_dtype])
    return result, summed


def _fake_stack(first: Tensor, second: Tensor, third: Tensor, bias_dtype: torch.dtype, stores: bool) -> list[Tensor]:
    T, D = first.shape
    return [*empty_sums(first, 3 * D, [bias_dtype]), *([first.new_empty((T, 3 * D))] if stores else [])]


@operator("stack_gradients", _fake_stack)
def stack_gradients(
    first: Tensor, second: Tensor, third: Tensor, bias_dtype: torch.dtype, stores: bool
) -> list[Tensor]:
    """Return the sums over rows of three gradients [T, D], one after the other: [3 D]; with `stores` also [T, 3 D].

    The gradients have one dtype and one distance between rows; a row is contiguous. bias_dtype: of the sums.
    """
    T, D = first.shape
    rows, columns, chunk, programs = columns_tiling(T, D, 3)
    stacked = [first.new_empty((T, 3 * D))] if stores else []
    partials = first.new_empty((programs, 1, 3 * D), dtype=torch.float32)
    stack_gradients_kernel[(programs, 3 * triton.cdiv(D, columns))](
        *(first, second, third, stacked[0] if stores else first, partials, T, chunk),
        STRIDE=first.stride(0),
        D=D,
        ROWS=rows,
        COLUMNS=columns,
        STORES=stores,
        num_warps=WARPS,
    )
    return [*sum_partials(partials, [bias_dtype]), *stacked]


def _gelu_scratch(upstream: Tensor, x: Tensor, bias_dtype: torch.dtype) -> int:
    return 4 * columns_tiling(x.shape[0], x.shape[1]).programs * x.shape[1]


def _stack_scratch(first: Tensor, second: Tensor, third: Tensor, bias_dtype: torch.dtype, stores: bool) -> int:
    return 4 * columns_tiling(first.shape[0], first.shape[1], 3).programs * 3 * first.shape[1]


SCRATCH_BYTES["gelu_bias_backward"] = _gelu_scratch
SCRATCH_BYTES["stack_gradients"] = _stack_scratch
