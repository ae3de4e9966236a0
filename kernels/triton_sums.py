"""Sums over the rows of a matrix in two steps: programs leave partial sums, and a second launch adds these up.

No addition is atomic and the order is fixed, so results are the same at every call. What a first launch computes beside
its sums stands in `triton_norm.py` and `triton_bias.py`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs that fill a large GPU twice. Each leaves sums of its own.
PROGRAMS = 264
WARPS = 8
STAGES = 3  # Triton's default
# Partial sums and columns that one program of the second launch takes at a time.
PARTS, COLUMNS = 32, 64
SECOND_WARPS = 4

SCRATCH_BYTES: dict[str, Callable[..., int]] = {}
"""For each operator with a second launch: bytes of its partial sums, from the operator's arguments.

These bytes are written once and read once, beside the operator's operands.
"""


class Tiling(NamedTuple):
    """How rows and columns are dealt out: a tile's `rows` and `columns`, and `chunk` rows for each of `programs`."""

    rows: int
    columns: int
    chunk: int
    programs: int


def tile(rows: int, columns: int, elements: int, programs: int = PROGRAMS) -> Tiling:
    """Cut `rows` into equal chunks of whole tiles of `elements` elements, for at most `programs` programs.

    columns: of a tile, a power of 2. No program is without rows, unless there are none.
    """
    tile_rows = max(1, elements // columns)
    tiles = max(1, triton.cdiv(rows, tile_rows))
    chunk = triton.cdiv(tiles, min(programs, tiles)) * tile_rows
    return Tiling(tile_rows, columns, chunk, max(1, triton.cdiv(rows, chunk)))


@triton.jit
def sum_partials_kernel(
    partials,  # [parts, sums, W] float32
    first,  # [W] for each sum; those that do not exist stand for `first`
    second,
    third,
    parts,
    sums,
    W: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add up one of the sums over all parts, for a block of columns."""
    which = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        place = (part[:, None] * sums + which) * W + column[None, :]
        total += tl.load(partials + place, mask=(part < parts)[:, None] & (column < W)[None, :], other=0.0)
    result = tl.sum(total, 0)
    if which == 0:
        tl.store(first + column, result.to(first.dtype.element_ty), mask=column < W)
    elif which == 1:
        tl.store(second + column, result.to(second.dtype.element_ty), mask=column < W)
    else:
        tl.store(third + column, result.to(third.dtype.element_ty), mask=column < W)


def sum_partials(partials: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Add up partial sums [parts, sums, W] over the parts; returns a tensor [W] for each of one to three sums."""
    parts, sums, W = partials.shape
    results = empty_sums(partials, W, dtypes)
    targets = [*results, *results[:1] * (3 - sums)]
    sum_partials_kernel[(triton.cdiv(W, COLUMNS), sums)](
        *(partials, *targets, parts, sums), **sum_constants(W), num_warps=SECOND_WARPS
    )
    return results


def empty_sums(like: Tensor, width: int, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Return an uninitialised [width] for each dtype, on the device of `like`."""
    return [like.new_empty(width, dtype=dtype) for dtype in dtypes]


def sum_constants(width: int) -> dict[str, int]:
    """Return the compile-time constants of `sum_partials_kernel`."""
    return {"W": width, "PARTS": PARTS, "COLUMNS": COLUMNS}
