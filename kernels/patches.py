"""Crops to the rows that a patch embedding multiplies: cut into patches, and 8-bit levels normalised on the way.

A level is looked up in a table of the 256 normalised values of its channel. So a pixel has the same value on every
device, to the last bit. On a GPU the kernel of `triton_patches.py` reads the levels and writes the rows in one pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cosmos_scale.kernels.serving import has_triton, like_gpu

LEVELS = 256
PIECE = 2**18  # values that a CPU looks up at a time


def cut_patches(images_BCHW: Tensor, size: int) -> Tensor:
    """Return the pixels of each whole patch of size x size: [B, rows x columns, C size size], a copy.

    images: [B, C, H, W]. Patches follow each other row by row; pixels past the last whole patch are left out.
    """
    rows, columns = images_BCHW.shape[2] // size, images_BCHW.shape[3] // size
    whole = images_BCHW[:, :, : rows * size, : columns * size]
    patches: Tensor = whole.unflatten(3, (columns, size)).unflatten(2, (rows, size)).permute(0, 2, 4, 1, 3, 5)
    return patches.flatten(3).flatten(1, 2)


def level_values(mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return the normalised value of each 8-bit level in each channel, (level / 255 - mean) / std: [C, 256].

    mean, std: of levels in 0..1, one a channel. Values are rounded to float32, and from there to dtype.
    """
    levels = torch.arange(LEVELS, dtype=torch.float64) / 255
    mean_C1, std_C1 = (torch.tensor(numbers, dtype=torch.float64)[:, None] for numbers in (mean, std))
    return ((levels - mean_C1) / std_C1).float().to(dtype)


def normalised_patches(crops: Sequence[Tensor], size: int, values: Tensor, *, triton: bool = True) -> Tensor:
    """Cut crops of 8-bit levels into patches and look the levels up: [sum of B x rows x columns, C size size].

    crops: a tensor [B, C, H, W] uint8 for each resolution, on one device. values: [C, 256], as
    `level_values` returns them; their dtype is the result's. The order is that of `cut_patches`. triton: whether the
    Triton kernel may serve. Both forms give the same bits.
    """
    counts = [images.shape[0] * (images.shape[2] // size) * (images.shape[3] // size) for images in crops]
    result = values.new_empty(sum(counts), values.shape[0] * size * size)
    write = _write_fused if triton and _is_fused(values) else _write
    for images, rows in zip(crops, result.split(counts), strict=True):
        if len(rows):
            write(rows, images, values, size)
    return result


def _write(rows: Tensor, images_BCHW: Tensor, values: Tensor, size: int) -> None:
    first_C11 = LEVELS * torch.arange(values.shape[0], dtype=torch.int32, device=values.device)[:, None, None]
    # On a CPU a few crops at a time, whose places stay in its caches; a GPU would launch more kernels.
    piece = max(1, PIECE // images_BCHW[0].numel()) if not like_gpu(values.device) else len(images_BCHW)
    pieces = images_BCHW.split(piece)
    for images, into in zip(pieces, rows.split(len(rows) * piece // len(images_BCHW)), strict=True):
        places = cut_patches(images.to(torch.int32).add_(first_C11), size)
        torch.index_select(values.flatten(), 0, places.flatten(), out=into.view(-1))


def _write_fused(rows: Tensor, images_BCHW: Tensor, values: Tensor, size: int) -> None:
    from cosmos_scale.kernels import triton_patches  # here: triton is there on Linux with a GPU build of torch only

    triton_patches.write_patches_(rows, images_BCHW.contiguous(), values, size)


def _is_fused(values: Tensor) -> bool:
    """Tell whether the Triton kernel serves: on a GPU, or where tensors stand for a GPU's."""
    return like_gpu(values.device) and has_triton()
