"""The multi-pair contrastive loss as two Triton kernels: no logits in memory, low-precision products, float32 sums.

`statistics` reduces the logits of each pair to numbers of each row and each column, a block of rows and a stretch of
columns at a time. `slopes` forms the logits again, turns them into the loss's slopes and multiplies these by the other
side's features at once. `contrastive.py` calls both where features are of low precision and on a GPU, and combines what
they leave; there the loss is explained.

Results are the same at every call: no atomic addition, each program writes numbers of its own. Products of features are
exact and summed in float32; slopes are rounded to the features' dtype before the second product (see SLOPE_FACTOR).
Source of the online logsumexp: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cosmos_scale.kernels.contrastive import SLOPE_FACTOR

# Columns that one program of `statistics` takes.
STRETCH = 1024
# Programs of `slopes` that fill a large GPU twice; with fewer, each takes a part of the other side's features.
PROGRAMS = 264


class TileSizes(NamedTuple):
    """Sizes of the kernels' tiles: rows, columns, width of a product's step, width of the result; warps, stages."""

    rows: int = 64
    columns: int = 64
    step: int = 64
    width: int = 256
    warps: int = 8
    stages: int = 2


TILES = TileSizes()


@triton.jit
def cosines(
    rows,
    row_place,  # [ROWS] which features of `rows`
    row_exists,
    columns,
    column_place,  # [COLUMNS] which features of `columns`
    column_exists,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Multiply a block of features by another, summed in float32: [ROWS, COLUMNS]; 0 where either does not exist."""
    result = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(0, E, STEP):
        inner = step + tl.arange(0, STEP)
        a = tl.load(
            rows + row_place[:, None] * E + inner[None, :], mask=row_exists[:, None] & (inner < E)[None, :], other=0.0
        )
        b = tl.load(
            columns + column_place[None, :] * E + inner[:, None],
            mask=column_exists[None, :] & (inner < E)[:, None],
            other=0.0,
        )
        result = tl.dot(a, b, result, input_precision="ieee")
    return result


@triton.jit
def statistics_kernel(
    rows,  # [V, B, E]
    columns,  # [T, G, E]
    scale,  # [] float32
    row_lse,  # [V, T, stretches, B]
    positive,  # [V, T, stop - start]
    column_lse,  # [V, T, row blocks, G]
    B,
    G,
    T,
    offset,  # the positive of row i is column i + offset
    start,  # rows start to stop - 1 have a positive
    stop,
    E: tl.constexpr,
    STRETCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Reduce the logits of a pair, a block of rows and a stretch of columns: the logsumexp of each row and column."""
    block, pair, stretch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    view, other = pair // T, pair % T
    factor = tl.load(scale)
    row = block * ROWS + tl.arange(0, ROWS)
    row_exists = row < B
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    own = tl.zeros([ROWS], tl.float32)
    begin = stretch * STRETCH
    end = tl.minimum(begin + STRETCH, G)
    column_result = (pair * tl.num_programs(0) + block) * G
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        column_exists = column < end
        row_place, column_place = view * B + row, other * G + column
        logits = factor * cosines(
            rows, row_place, row_exists, columns, column_place, column_exists, E, ROWS, COLUMNS, STEP
        )
        own += tl.sum(tl.where(column[None, :] == (row + offset)[:, None], logits, 0.0), 1)
        in_row = tl.where(column_exists[None, :], logits, float("-inf"))
        higher = tl.maximum(largest, tl.max(in_row, 1))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(in_row - higher[:, None]), 1)
        largest = higher
        in_column = tl.where(row_exists[:, None], logits, float("-inf"))
        highest = tl.max(in_column, 0)
        sums = tl.sum(tl.exp(in_column - highest[None, :]), 0)
        tl.store(column_lse + column_result + column, highest + tl.log(sums), mask=column_exists)
    row_result = (pair * tl.num_programs(2) + stretch) * B + row
    tl.store(row_lse + row_result, largest + tl.log(total), mask=row_exists)
    own_column = row + offset
    here = (row >= start) & (row < stop) & (own_column >= begin) & (own_column < end)
    tl.store(positive + pair * (stop - start) + row - start, own, mask=here)


@triton.jit
def slopes_kernel(
    features,  # [Va, A, E], whose gradients these are
    others,  # [Vc, C, E]
    scale,  # [] float32
    weights,  # [Va, Vc] or transposed, of any floating dtype
    lse,  # logsumexp of each of `features`' logits
    others_lse,
    gradients,  # [parts, Va, A, E] float32
    A,
    C,
    Vc,
    offset,  # the positive of feature i is the other feature i + offset
    start,  # features start to stop - 1 have a positive
    stop,
    samples,  # of all ranks
    part_size,  # of the other features that one program takes
    weight_a,
    weight_c,
    lse_a,
    lse_c,
    others_a,
    others_c,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOPE_FACTOR: tl.constexpr,
):
    """Sum weight * (softmax by row + softmax by column - 2 at the positive) * other feature over a part of them."""
    block, view = tl.program_id(0), tl.program_id(1).to(tl.int64)
    widths = tl.cdiv(E, WIDTH)
    part, slice_of = tl.program_id(2) // widths, tl.program_id(2) % widths
    factor = tl.load(scale)
    row = block * ROWS + tl.arange(0, ROWS)
    row_exists = row < A
    has_positive = (row >= start) & (row < stop)
    out = slice_of * WIDTH + tl.arange(0, WIDTH)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    begin = part * part_size
    end = tl.minimum(begin + part_size, C)
    for other in range(0, Vc):
        weight = tl.load(weights + view * weight_a + other * weight_c)
        weight = (weight * SLOPE_FACTOR).to(tl.float32)
        own_lse = tl.load(lse + view * lse_a + other * lse_c + row, mask=row_exists, other=0.0)
        for first in range(begin, end, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            column_exists = column < end
            place = (other * C + column).to(tl.int64)
            logits = factor * cosines(
                features, view * A + row, row_exists, others, place, column_exists, E, ROWS, COLUMNS, STEP
            )
            other_lse = tl.load(others_lse + view * others_a + other * others_c + column, mask=column_exists, other=0.0)
            slope = tl.exp(logits - own_lse[:, None]) + tl.exp(logits - other_lse[None, :])
            is_positive = (column[None, :] == (row + offset)[:, None]) & has_positive[:, None]
            slope = tl.where(is_positive, slope - 2.0, slope) * weight
            slope = tl.where(row_exists[:, None] & column_exists[None, :], slope, 0.0)
            c = tl.load(
                others + place[:, None] * E + out[None, :],
                mask=column_exists[:, None] & (out < E)[None, :],
                other=0.0,
            )
            result = tl.dot(slope.to(c.dtype), c, result, input_precision="ieee")
    target = gradients + ((part * tl.num_programs(1) + view) * A + row)[:, None] * E + out[None, :]
    factor *= 0.5 / samples / SLOPE_FACTOR
    tl.store(target, result * factor, mask=row_exists[:, None] & (out < E)[None, :])


@torch.library.custom_op("cosmos_scale::contrastive_statistics", mutates_args=())
def statistics(rows: Tensor, columns: Tensor, scale: Tensor, offset: int, start: int, stop: int) -> list[Tensor]:
    """Return row_lse [V, T, stretches, B], positive [V, T, stop - start], column_lse [V, T, blocks, G]; float32.

    rows: [V, B, E]; columns: [T, G, E]; both contiguous, of one floating dtype. scale: [] float32. The positive of row
    i, from start to stop - 1, is column i + offset. Each logsumexp is over a stretch of columns or a block of rows.
    """
    (V, B, E), (T, G, _) = rows.shape, columns.shape
    results = _empty_statistics(rows, columns, stop - start)
    row_lse, _, column_lse = results
    grid = (column_lse.shape[2], V * T, row_lse.shape[2])
    statistics_kernel[grid](
        *(rows, columns, scale, *results, B, G, T, offset, start, stop),
        **statistics_constants(TILES, E),
        num_warps=TILES.warps,
        num_stages=TILES.stages,
    )
    return results


@statistics.register_fake
def _(rows: Tensor, columns: Tensor, scale: Tensor, offset: int, start: int, stop: int) -> list[Tensor]:
    return _empty_statistics(rows, columns, stop - start)


@torch.library.custom_op("cosmos_scale::contrastive_slopes", mutates_args=())
def slopes(
    features: Tensor,
    others: Tensor,
    scale: Tensor,
    weights: Tensor,
    lse: Tensor,
    others_lse: Tensor,
    offset: int,
    start: int,
    stop: int,
    samples: int,
    transposed: bool,
) -> Tensor:
    """Return the derivatives of the loss by `features`, in parts to be added: [parts, Va, A, E] float32.

    features: [Va, A, E]; others: [Vc, C, E]; both contiguous, of one floating dtype. scale: [] float32. The positive of
    feature i, from start to stop - 1, is the other feature i + offset. samples: of all ranks. weights: [Va, Vc]. lse:
    [Va, Vc, A]; others_lse: [Va, Vc, C]; float32, contiguous. transposed: whether the first two dimensions of these
    three are the other way round.
    """
    (Va, A, E), (Vc, C, _) = features.shape, others.shape
    gradients = _empty_slopes(features, others)
    part_size = _part_size(C, gradients.shape[0])
    constants = slopes_constants(TILES, E)
    grid = (triton.cdiv(A, TILES.rows), Va, gradients.shape[0] * triton.cdiv(E, constants["WIDTH"]))

    def strides(length: int) -> tuple[int, int]:
        return (length, Va * length) if transposed else (Vc * length, length)

    slopes_kernel[grid](
        *(
            features,
            others,
            scale,
            weights,
            lse,
            others_lse,
            gradients,
            A,
            C,
            Vc,
            offset,
            start,
            stop,
            samples,
            part_size,
        ),
        *(*strides(1), *strides(A), *strides(C)),
        **constants,
        num_warps=TILES.warps,
        num_stages=TILES.stages,
    )
    return gradients


@slopes.register_fake
def _(
    features: Tensor,
    others: Tensor,
    scale: Tensor,
    weights: Tensor,
    lse: Tensor,
    others_lse: Tensor,
    offset: int,
    start: int,
    stop: int,
    samples: int,
    transposed: bool,
) -> Tensor:
    return _empty_slopes(features, others)


def statistics_constants(tiles: TileSizes, E: int) -> dict[str, int]:
    """Return the compile-time constants of `statistics_kernel` for features of width E."""
    return {"E": E, "STRETCH": STRETCH, "ROWS": tiles.rows, "COLUMNS": tiles.columns, "STEP": tiles.step}


def slopes_constants(tiles: TileSizes, E: int) -> dict[str, int]:
    """Return the compile-time constants of `slopes_kernel` for features of width E."""
    width = min(tiles.width, triton.next_power_of_2(max(16, E)))
    sizes = {"E": E, "ROWS": tiles.rows, "COLUMNS": tiles.columns, "STEP": tiles.step, "WIDTH": width}
    return sizes | {"SLOPE_FACTOR": SLOPE_FACTOR}


@register_flop_formula(torch.ops.cosmos_scale.contrastive_statistics)
def _statistics_flops(rows: Any, columns: Any, *_: Any, **__: Any) -> int:
    """Return the operations of one product a pair."""
    return int(2 * rows[0] * columns[0] * rows[1] * columns[1] * rows[2])


@register_flop_formula(torch.ops.cosmos_scale.contrastive_slopes)
def _slopes_flops(features: Any, others: Any, *_: Any, **__: Any) -> int:
    """Return the operations of the products a pair: logits for each slice of the width, and the gradient."""
    slices = -(-features[2] // slopes_constants(TILES, features[2])["WIDTH"])
    product = 2 * features[0] * others[0] * features[1] * others[1] * features[2]
    return int(product * (1 + slices))


def _empty_statistics(rows: Tensor, columns: Tensor, positives: int) -> list[Tensor]:
    (V, B, _), (T, G, _) = rows.shape, columns.shape
    shapes = ((V, T, -(-G // STRETCH), B), (V, T, positives), (V, T, -(-B // TILES.rows), G))
    return [rows.new_empty(shape, dtype=torch.float32) for shape in shapes]


def _empty_slopes(features: Tensor, others: Tensor) -> Tensor:
    (V, A, E), C = features.shape, others.shape[1]
    programs = V * -(-A // TILES.rows) * -(-E // slopes_constants(TILES, E)["WIDTH"])
    parts = -(-C // _part_size(C, max(1, PROGRAMS // programs)))
    return features.new_empty((parts, V, A, E), dtype=torch.float32)


def _part_size(features: int, parts: int) -> int:
    """Return how many features a part holds: whole blocks, so that no part is empty."""
    blocks = -(-features // TILES.columns)
    return -(-blocks // parts) * TILES.columns
