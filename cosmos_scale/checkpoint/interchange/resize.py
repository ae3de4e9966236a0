"""Position tables of another length: of a model for other image sizes, patch grids or context lengths.

A run interpolates its table for crops of other sizes at every step, in another way (`model/vision.py`). What is here
makes a table anew for a model of its own, once, as OpenCLIP does when it loads weights.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from cosmos_scale.checkpoint.interchange.names import Shape

IMAGE_TABLE, TEXT_TABLE = "visual.positional_embedding", "positional_embedding"


def can_resize(name: str, shape: Shape, wanted: Shape) -> bool:
    """Tell whether a tensor, by our name, is a position table that can be given the wanted shape."""
    return name in (IMAGE_TABLE, TEXT_TABLE) and len(shape) == 2 and shape[1:] == wanted[1:]


def resizing(name: str, shape: Shape, wanted: Shape) -> str:
    """Return what `resize_table` does to a table, in words."""
    if name == TEXT_TABLE:
        return f"text positions resized from {shape[0]} to {wanted[0]}"
    old, new = math.isqrt(shape[0] - 1), math.isqrt(wanted[0] - 1)
    return f"image positions resized from {old} x {old} to {new} x {new} patches"


def resize_table(name: str, table_LD: Tensor, wanted: Shape) -> Tensor:
    """Return a position table, by our name, in the wanted shape; a table of that shape as it is.

    The image table keeps its first row, that of the class token. Its other rows are a square of patches, resized
    bicubically with antialiasing. The text table is resized linearly, without. Corners are aligned in neither.
    """
    if tuple(table_LD.shape) == wanted:
        return table_LD
    if name == TEXT_TABLE:
        row_1DL = table_LD.T[None]
        resized_1DL = functional.interpolate(row_1DL, size=wanted[0], mode="linear", align_corners=False)
        return resized_1DL[0].T.contiguous()
    class_1D, patches_PD = table_LD.split([1, len(table_LD) - 1])
    old, new = math.isqrt(len(patches_PD)), math.isqrt(wanted[0] - 1)
    square = patches_PD.T.reshape(1, -1, old, old)
    resized = functional.interpolate(square, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([class_1D, resized[0].flatten(1).T])


def resize_tables(tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Return a model's tensors, by our names, with both position tables in the shapes of another model."""
    tables = {name: resize_table(name, tensors[name], shapes[name]) for name in (IMAGE_TABLE, TEXT_TABLE)}
    return {**tensors, **tables}
