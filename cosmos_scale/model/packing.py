"""Packed layouts: how the tokens of all views of a tower lie one after the other, and which of them are read.

The tower's blocks see one [T, D] matrix. Layouts are made on the host, by numpy, from lengths that the host knows: the
host does not wait for the device.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cosmos_scale.kernels.segments import Segments, to_device
from cosmos_scale.kernels.serving import like_gpu

Integers = npt.NDArray[np.int64]


class CropLayout(NamedTuple):
    """Packed crops, resolution by resolution: of each crop the class token and then the patches.

    read: [R] int64, the packed tokens that are used after the last block: the class tokens of all crops, then the
    patches of the first crops.
    """

    segments: Segments
    read: Tensor


class CaptionLayout(NamedTuple):
    """Packed captions, the longest first, so that neighbours are about equally long; then tokens that fill up.

    Tokens that fill up are segments of their own, which nobody reads: they are computed, so that they hold numbers.

    ids: [T] int64, each packed token's place among the flattened [B, L] ids. places: [T] int64, each packed token's
    place in its caption. read: [R] int64, the packed tokens that are used after the last block: the EOT of each
    caption, in the order of the rows of ids, then all kept tokens of the first captions. read_lengths: how many tokens
    each of these first captions keeps.
    """

    segments: Segments
    ids: Tensor
    places: Tensor
    read: Tensor
    read_lengths: tuple[int, ...]


def token_multiple(wanted: int | None, device: torch.device) -> int:
    """Return what the number of packed text tokens is a multiple of: `wanted`, or by default 256 on a GPU.

    The number of tokens is another at each step. A GPU's allocator would keep memory for each number that it has seen.
    """
    if wanted is not None:
        return wanted
    return 256 if like_gpu(device) else 1


@cache  # kept for good: a CUDA graph reads them, and there are few
def pack_crops(crops: tuple[tuple[int, int], ...], tokens_of: int, device: torch.device) -> CropLayout:
    """Return the layout of a training step's crops, as `lay_out_crops` does."""
    return lay_out_crops(crops, tokens_of, device)


def lay_out_crops(crops: tuple[tuple[int, int], ...], tokens_of: int, device: torch.device) -> CropLayout:
    """Lay out crops, by resolution (how many, tokens of each); the patches of the first `tokens_of` crops are read."""
    lengths = np.repeat([length for _, length in crops], [count for count, _ in crops])
    starts = lengths.cumsum() - lengths
    patches = starts[:tokens_of, None] + np.arange(1, crops[0][1])
    return CropLayout(Segments(lengths.tolist()), to_device(np.concatenate([starts, patches.ravel()]), device))


def pack_captions(
    lengths_B: Tensor,
    context: int,
    device: torch.device,
    tokens_of: int = 0,
    keep_padding: bool = False,
    multiple: int = 1,
) -> CaptionLayout:
    """Lay out captions cut at their EOT.

    lengths: [B] int64 on the CPU, tokens up to and including EOT. context: L of the ids. All tokens of the first
    `tokens_of` captions are read; with keep_padding these captions keep their padding. multiple: tokens fill up to a
    multiple of it. Raises ValueError for a length below 1 or above L, which would reach into another caption's tokens.
    """
    lengths = lengths_B.numpy()  # raises for a tensor on a device, whose reading would make the host wait
    if lengths.min() < 1 or lengths.max() > context:
        raise ValueError(f"caption lengths must be from 1 to {context}, not {lengths.tolist()}")
    kept = lengths.copy()
    if keep_padding:
        kept[:tokens_of] = context
    order = np.argsort(-kept, kind="stable")
    sizes = kept[order]
    starts = sizes.cumsum() - sizes
    filling = filling_lengths(int(sizes.sum()), multiple, context)
    all_sizes = np.concatenate([sizes, filling])
    places = _ranges(np.zeros_like(all_sizes), all_sizes)
    starts_B = np.empty_like(starts)
    starts_B[order] = starts
    tokens = _ranges(starts_B[:tokens_of], kept[:tokens_of])
    # Tokens that fill up are tokens of the first caption.
    ids = _ranges(np.concatenate([order * context, np.zeros_like(filling)]), all_sizes)
    read = np.concatenate([starts_B + lengths - 1, tokens])
    # One copy to the device, cut there.
    on_device = to_device(np.concatenate([ids, places, read]), device)
    ids_T, places_T, read_R = on_device.split([len(ids), len(places), len(read)])
    return CaptionLayout(Segments(all_sizes.tolist()), ids_T, places_T, read_R, tuple(kept[:tokens_of].tolist()))


def filling_lengths(tokens: int, multiple: int, context: int) -> Integers:
    """Return the lengths of the segments, at most `context` long, that fill up to a multiple."""
    missing = -tokens % multiple
    whole, rest = divmod(missing, context)
    return np.array([context] * whole + [rest] * (rest > 0), dtype=np.int64)


def _ranges(starts: Integers, sizes: Integers) -> Integers:
    """Return start, start + 1, ... for each start, as many as its size says, in one array."""
    ends = sizes.cumsum()
    return np.arange(sizes.sum()) + np.repeat(starts - (ends - sizes), sizes)
