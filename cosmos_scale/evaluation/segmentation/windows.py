"""Windows of a picture, the classes' logits in them, and their mean over all windows.

Logits are formed for a band of rows at a time, from the small grids of the windows' patches: the logits of all queries
at all pixels of a large picture are never in memory together.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Rows = Callable[[int, int], Tensor]
"""From a first row to the row after the last, the values of these rows: [Q, rows, W]."""


class Window(NamedTuple):
    """A part of a picture, in pixels; bottom and right are outside of it."""

    top: int
    bottom: int
    left: int
    right: int


def sliding_windows(height: int, width: int, crop: int, stride: int) -> list[Window]:
    """Return the windows of a picture, row by row; crop 0: one window, the whole picture.

    The last window of a row or column is shifted back, so that it ends where the picture ends. A picture that is
    smaller than the crop has one smaller window.
    """
    if not crop:
        return [Window(0, height, 0, width)]
    columns = _spans(width, crop, stride)
    return [Window(*rows, *span) for rows in _spans(height, crop, stride) for span in columns]


def _spans(side: int, crop: int, stride: int) -> list[tuple[int, int]]:
    count = max(side - crop + stride - 1, 0) // stride + 1
    ends = [min(place * stride + crop, side) for place in range(count)]
    return [(max(end - crop, 0), end) for end in ends]


def cut_windows(picture_CHW: Tensor, windows: list[Window]) -> Tensor:
    """Return the windows of a picture, which all have one size: [windows, C, height, width]."""
    return torch.stack([picture_CHW[:, top:bottom, left:right] for top, bottom, left, right in windows])


class WindowLogits(NamedTuple):
    """The likeness of each patch of each window to each query.

    grids: [windows, Q, rows, columns]. height, width: of the picture that the windows were cut from.
    """

    grids: Tensor
    windows: list[Window]
    height: int
    width: int

    def mean_rows(self, first: int, last: int) -> Tensor:
        """Return rows of the mean over all windows that hold a pixel: [Q, last - first, width].

        The grid of a window is enlarged to the window's size, though its patches may not fill the window.
        """
        total_QRW = self.grids.new_zeros(self.grids.shape[1], last - first, self.width)
        count_RW = self.grids.new_zeros(last - first, self.width)
        for grid_Qrc, (top, bottom, left, right) in zip(self.grids, self.windows, strict=True):
            start, end = max(top, first), min(bottom, last)
            if start < end:
                rows, columns = slice(start - first, end - first), slice(left, right)
                size = (bottom - top, right - left)
                enlarged = resized_rows(_rows_of(grid_Qrc), grid_Qrc.shape[1], size, start - top, end - top)
                total_QRW[:, rows, columns] += enlarged
                count_RW[rows, columns] += 1
        return total_QRW.div_(count_RW)

    def rows_at(self, size: tuple[int, int], whole: bool) -> Rows:
        """Return a function that gives rows of the mean logits, bilinearly resized to `size`: [Q, rows, size[1]].

        whole: the picture is its only window, whose grid is resized in one step.
        """
        if whole:
            rows, height = _rows_of(self.grids[0]), self.grids.shape[2]
        else:
            rows, height = self.mean_rows, self.height
        return lambda first, last: resized_rows(rows, height, size, first, last)


def resized_rows(rows_of: Rows, height: int, size: tuple[int, int], first: int, last: int) -> Tensor:
    """Return rows of a bilinear resize, corners not aligned, no antialias: [Q, last - first, size[1]].

    rows_of: rows of the source, of which there are `height`. size: height and width of the whole result.
    """
    places = ((torch.arange(first, last, dtype=torch.float64) + 0.5) * (height / size[0]) - 0.5).clamp_(min=0)
    upper = places.long().clamp_(max=height - 1)
    lower = (upper + 1).clamp_(max=height - 1)
    start = int(upper[0])
    source_QRw = rows_of(start, int(lower[-1]) + 1)
    device, dtype = source_QRw.device, source_QRw.dtype
    above, below = (source_QRw.index_select(1, (rows - start).to(device)) for rows in (upper, lower))
    share_R1 = (places - upper).to(device, dtype)[:, None]
    mixed_QRw = torch.lerp(above, below, share_R1)
    if mixed_QRw.shape[2] == size[1]:
        return mixed_QRw
    # The height stays: only columns are mixed here.
    return functional.interpolate(mixed_QRw[None], (last - first, size[1]), mode="bilinear", align_corners=False)[0]


def _rows_of(values_QHW: Tensor) -> Rows:
    return lambda first, last: values_QHW[:, first:last]
