"""Windows of a picture, the classes' logits in them, and their mean over all windows.

Logits are formed for a band of rows at a time, from the small grids of the windows' patches: the logits of all queries
at all pixels of a large picture are never in memory together.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Rows = Callable[[int, int], Tensor]
"""From a first row to the row after the last, the logits of these rows: [Q, rows, W].

Queries come last in memory: a pixel's logits lie side by side, where their largest is found soonest.
"""


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

    def mean(self) -> Rows:
        """Return the mean over all windows that hold a pixel, at the size of the picture that was cut.

        The grid of a window is enlarged to the window's size, though its patches may not fill the window.
        """
        return self._rows(lambda matrix, _: matrix, (self.height, self.width))

    def resized(self, size: tuple[int, int], *, whole: bool) -> Rows:
        """Return the mean, bilinearly resized to `size`: corners not aligned, no antialias.

        whole: the picture is its only window, whose grid is resized in one step.
        """
        if whole:
            rows, columns = (
                bilinear_matrix(cells, target) for cells, target in zip(self.grids.shape[2:], size, strict=True)
            )
            return self._map(rows, columns)
        return self._rows(lambda matrix, target: bilinear_matrix(len(matrix), target) @ matrix, size)

    def _rows(self, resize: Callable[[Tensor, int], Tensor], size: tuple[int, int]) -> Rows:
        rows = dict.fromkeys((window.top, window.bottom) for window in self.windows)
        columns = dict.fromkeys((window.left, window.right) for window in self.windows)
        by_row = resize(_mean_matrix(list(rows), self.height, self.grids.shape[2]), size[0])
        by_column = resize(_mean_matrix(list(columns), self.width, self.grids.shape[3]), size[1])
        return self._map(by_row, by_column)

    def _map(self, by_row: Tensor, by_column: Tensor) -> Rows:
        """Return rows of by_row @ grids @ by_column.T, the grids of all windows joined into one for each query.

        Enlarging, the mean and resizing are linear, and each goes by rows and by columns alone: two products do it all.
        Few of the patches' rows touch a band of rows: the others, whose weights are zero, are left out.
        """
        windows_in_row = by_column.shape[1] // self.grids.shape[3]
        by_place = self.grids.unflatten(0, (-1, windows_in_row))
        joined_rcQ = by_place.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).contiguous()
        device, dtype = joined_rcQ.device, joined_rcQ.dtype
        by_column = by_column.to(device, dtype)

        def rows(first: int, last: int) -> Tensor:
            weights = by_row[first:last]
            (touching,) = weights.any(0).nonzero(as_tuple=True)
            widened_tWQ = by_column @ joined_rcQ[touching.to(device)]
            band = weights[:, touching].to(device, dtype) @ widened_tWQ.flatten(1)
            by_query: Tensor = band.unflatten(1, widened_tWQ.shape[1:]).permute(2, 0, 1)
            return by_query

        return rows


def bilinear_matrix(source: int, target: int) -> Tensor:
    """Return the bilinear resize of a side as a matrix [target, source] float64: corners not aligned, no antialias."""
    places = ((torch.arange(target, dtype=torch.float64) + 0.5) * (source / target) - 0.5).clamp_(min=0)
    first = places.long().clamp_(max=source - 1)
    second = (first + 1).clamp_(max=source - 1)
    share = places - first
    matrix = torch.zeros(target, source, dtype=torch.float64)
    rows = torch.arange(target)
    matrix.index_put_((rows, first), 1 - share, accumulate=True)
    matrix.index_put_((rows, second), share, accumulate=True)
    return matrix


def _mean_matrix(spans: list[tuple[int, int]], side: int, cells: int) -> Tensor:
    """Return the mean over windows along one side [side, spans x cells] float64; each window has `cells` patches."""
    matrix = torch.zeros(side, len(spans), cells, dtype=torch.float64)
    count = torch.zeros(side, 1, dtype=torch.float64)
    for number, (start, end) in enumerate(spans):
        matrix[start:end, number] = bilinear_matrix(cells, end - start)
        count[start:end] += 1
    return matrix.flatten(1) / count
