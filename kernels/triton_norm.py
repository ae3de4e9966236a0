"""Addition to the residual stream and layer norm as Triton kernels: one pass forward, one pass backward.

Forward: the sum is rounded to the stream's dtype, then normalised, as two torch operators would do. Backward: the
gradients that reach the normalised rows and the sum are joined. The same pass sums the gradients of gain and offset,
and that of the bias of the projection whose output was added: that is the sum over rows of the joined gradient.

Statistics and sums are float32; gain and offset may have another dtype than the rows. Source of the backward's formula:
Ba et al., Layer Normalization, 2016, derived for a whole row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos_scale.kernels.operators import operator
from cosmos_scale.kernels.triton_sums import SCRATCH_BYTES, WARPS, Tiling, empty_sums, sum_partials, tile

ELEMENTS = 2048  # of a tile


@triton.jit
def add_norm_kernel(
    x,  # [T, D]
    update,  # [T, D], only with ADDS
    gain,  # [D]
    offset,
    total,  # [T, D], only with ADDS
    normed,  # [T, D]
    mean,  # [T] float32, only with SAVES
    rstd,
    T,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADDS: tl.constexpr,
    SAVES: tl.constexpr,
):
    """Normalise x + update for a block of rows."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_width = column < D
    exists = (row < T)[:, None] & in_width[None, :]
    place = row.to(tl.int64)[:, None] * D + column[None, :]
    value = tl.load(x + place, mask=exists, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(update + place, mask=exists, other=0.0).to(tl.float32)
        rounded = (value + added).to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=exists)
        value = rounded.to(tl.float32)
    average = tl.sum(value, 1) / D
    centred = tl.where(exists, value - average[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    g = tl.load(gain + column, mask=in_width, other=0.0).to(tl.float32)
    b = tl.load(offset + column, mask=in_width, other=0.0).to(tl.float32)
    result = centred * inverse[:, None] * g[None, :] + b[None, :]
    tl.store(normed + place, result.to(normed.dtype.element_ty), mask=exists)
    if SAVES:
        tl.store(mean + row, average, mask=row < T)
        tl.store(rstd + row, inverse, mask=row < T)


@triton.jit
def add_norm_backward_kernel(
    d_normed,  # [T, D]
    d_total,  # [T, D], only with JOINS
    total,  # [T, D]
    mean,  # [T] float32
    rstd,
    gain,  # [D]
    result,  # [T, D]
    partials,  # [programs, 3 with SUMS_BIAS, else 2, D] float32: of gain, offset, bias
    T,
    chunk,  # rows of a program
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    JOINS: tl.constexpr,
    SUMS_BIAS: tl.constexpr,
):
    """Form the gradient of x + update for a chunk of rows, and sums over these rows."""
    program, column = tl.program_id(0), tl.arange(0, COLUMNS)
    in_width = column < D
    g = tl.load(gain + column, mask=in_width, other=0.0).to(tl.float32)
    for_gain = tl.zeros([ROWS, COLUMNS], tl.float32)
    for_offset = tl.zeros([ROWS, COLUMNS], tl.float32)
    for_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    begin = program * chunk
    end = tl.minimum(begin + chunk, T)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        exists = (row < end)[:, None] & in_width[None, :]
        place = row.to(tl.int64)[:, None] * D + column[None, :]
        upstream = tl.load(d_normed + place, mask=exists, other=0.0).to(tl.float32)
        value = tl.load(total + place, mask=exists, other=0.0).to(tl.float32)
        average = tl.load(mean + row, mask=row < end, other=0.0)
        inverse = tl.load(rstd + row, mask=row < end, other=0.0)
        unit = tl.where(exists, (value - average[:, None]) * inverse[:, None], 0.0)
        for_gain += upstream * unit
        for_offset += upstream
        slope = upstream * g[None, :]
        along = tl.sum(slope * unit, 1) / D
        average_slope = tl.sum(slope, 1) / D
        gradient = (slope - unit * along[:, None] - average_slope[:, None]) * inverse[:, None]
        if JOINS:
            gradient += tl.load(d_total + place, mask=exists, other=0.0).to(tl.float32)
        tl.store(result + place, gradient.to(result.dtype.element_ty), mask=exists)
        if SUMS_BIAS:
            for_bias += tl.where(exists, gradient, 0.0)
    SUMS: tl.constexpr = 3 if SUMS_BIAS else 2
    target = partials + program * SUMS * D + column
    tl.store(target, tl.sum(for_gain, 0), mask=in_width)
    tl.store(target + D, tl.sum(for_offset, 0), mask=in_width)
    if SUMS_BIAS:
        tl.store(target + 2 * D, tl.sum(for_bias, 0), mask=in_width)


def norm_tiling(rows: int, width: int) -> Tiling:
    """Return how rows of a width are dealt out: a tile holds whole rows."""
    return tile(rows, triton.next_power_of_2(width), ELEMENTS)


def _empty_forward(x: Tensor, update: Tensor | None, saves: bool) -> list[Tensor]:
    statistics = [x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2)] if saves else []
    return [torch.empty_like(x), *statistics, *([] if update is None else [torch.empty_like(x)])]


def _fake_forward(
    x: Tensor, update: Tensor | None, gain: Tensor, offset: Tensor, eps: float, saves: bool
) -> list[Tensor]:
    return _empty_forward(x, update, saves)


@operator("add_norm", _fake_forward)
def add_norm_forward(
    x: Tensor, update: Tensor | None, gain: Tensor, offset: Tensor, eps: float, saves: bool
) -> list[Tensor]:
    """Return layer_norm(x + update) [T, D]; with `saves` the rows' mean and 1/std [T] float32; with update the sum.

    x, update: [T, D], contiguous, of one dtype. gain, offset: [D].
    """
    results = _empty_forward(x, update, saves)
    normed, mean, rstd = (results[0], *results[1:3]) if saves else (results[0], x, x)
    rows, columns, *_ = norm_tiling(*x.shape)
    add_norm_kernel[(max(1, triton.cdiv(x.shape[0], rows)),)](
        *(x, x if update is None else update, gain, offset, x if update is None else results[-1], normed, mean, rstd),
        *(x.shape[0], eps),
        D=x.shape[1],
        ROWS=rows,
        COLUMNS=columns,
        ADDS=update is not None,
        SAVES=saves,
        num_warps=WARPS,
    )
    return results


def _fake_backward(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gain: Tensor,
    gain_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> list[Tensor]:
    dtypes = [gain_dtype, gain_dtype, *([] if bias_dtype is None else [bias_dtype])]
    return [torch.empty_like(total), *empty_sums(total, total.shape[1], dtypes)]


@operator("add_norm_backward", _fake_backward)
def add_norm_backward(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gain: Tensor,
    gain_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Return the gradients of x and update [T, D] (they are the same), of gain and of offset [D] in gain_dtype.

    d_normed, d_total: [T, D], contiguous: what reaches the normalised rows and the sum. total: [T, D] the sum. mean,
    rstd: [T] float32. bias_dtype: unless None, the sum over rows of the first gradient is returned too, in this dtype.
    """
    T, D = total.shape
    rows, columns, chunk, programs = norm_tiling(T, D)
    result = torch.empty_like(total)
    dtypes = [gain_dtype, gain_dtype, *([] if bias_dtype is None else [bias_dtype])]
    partials = total.new_empty((programs, len(dtypes), D), dtype=torch.float32)
    add_norm_backward_kernel[(programs,)](
        *(d_normed, d_normed if d_total is None else d_total, total, mean, rstd, gain, result, partials, T, chunk),
        D=D,
        ROWS=rows,
        COLUMNS=columns,
        JOINS=d_total is not None,
        SUMS_BIAS=bias_dtype is not None,
        num_warps=WARPS,
    )
    return [result, *sum_partials(partials, dtypes)]


def _scratch(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gain: Tensor,
    gain_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> int:
    return 4 * norm_tiling(*total.shape).programs * (2 if bias_dtype is None else 3) * total.shape[1]


SCRATCH_BYTES["add_norm_backward"] = _scratch
