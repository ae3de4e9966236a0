"""Crops of 8-bit levels cut into normalised patches by a Triton kernel: one read of the levels, one write of the rows.

`patches.py` calls it on a GPU; there the order of a patch's pixels is explained.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 2048  # of one channel's row of patches, which one program takes
WARPS = 4


@triton.jit
def patches_kernel(
    levels,  # [B, CHANNELS, HEIGHT, WIDTH] uint8
    values,  # [CHANNELS, 256]
    rows,  # [B, patches, CHANNELS * SIZE * SIZE]
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Look up a stretch of SIZE lines of one channel of one crop, and store each pixel in the row of its patch."""
    plane, line = tl.program_id(0).to(tl.int64), tl.program_id(1)
    crop, channel = plane // CHANNELS, plane % CHANNELS
    columns: tl.constexpr = WIDTH // SIZE
    lines: tl.constexpr = HEIGHT // SIZE
    place = tl.program_id(2) * PIXELS + tl.arange(0, PIXELS)
    y, across = place // WIDTH, place % WIDTH
    column, x = across // SIZE, across % SIZE
    exists = place < SIZE * WIDTH
    level = tl.load(levels + (plane * HEIGHT + line * SIZE) * WIDTH + place, mask=exists, other=0)
    value = tl.load(values + channel * 256 + level.to(tl.int32))
    first = (crop * lines + line) * columns * (CHANNELS * SIZE * SIZE) + channel * (SIZE * SIZE)
    target = rows + first + column * (CHANNELS * SIZE * SIZE) + y * SIZE + x
    tl.store(target, value, mask=exists & (column < columns))


@torch.library.custom_op("cosmos_scale::write_patches_", mutates_args=("rows",))
def write_patches_(rows: Tensor, levels: Tensor, values: Tensor, size: int) -> None:
    """Write the normalised patches of crops into rows [B x patches, C size size], which are contiguous.

    levels: [B, C, H, W] uint8, contiguous. values: [C, 256] of rows' dtype, contiguous.
    """
    B, C, H, W = levels.shape
    grid = (B * C, H // size, triton.cdiv(size * W, PIXELS))
    patches_kernel[grid](levels, values, rows, **patches_constants(C, H, W, size), num_warps=WARPS)


@write_patches_.register_fake
def _(rows: Tensor, levels: Tensor, values: Tensor, size: int) -> None:
    pass


def patches_constants(C: int, H: int, W: int, size: int) -> dict[str, int]:
    """Return the compile-time constants of `patches_kernel` for crops [C, H, W] and patches of size x size."""
    return {"CHANNELS": C, "HEIGHT": H, "WIDTH": W, "SIZE": size, "PIXELS": PIXELS}
