"""Windows, their mean, and resizing by rows, against the oracle and torch; what is in memory at a time."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_scale.evaluation.segmentation import segmenter
from cosmos_scale.evaluation.segmentation.refine import refine
from cosmos_scale.evaluation.segmentation.segmenter import PictureLogits, Queries, Recipe, probability_bands
from cosmos_scale.evaluation.segmentation.windows import WindowLogits, bilinear_matrix, sliding_windows
from tests.evaluation.segmentation import oracle


@pytest.mark.parametrize(("crop", "stride"), [(32, 16), (32, 32), (32, 9), (7, 3)])
@pytest.mark.parametrize("height", [5, 31, 32, 33, 48, 49, 100])
def test_windows_are_the_published_ones(height: int, crop: int, stride: int) -> None:
    for width in (20, 32, 45, 77):
        ours = sliding_windows(height, width, crop, stride)
        assert [tuple(window) for window in ours] == oracle.windows(height, width, crop, stride)
        covered = np.zeros((height, width), dtype=bool)
        for top, bottom, left, right in ours:
            covered[top:bottom, left:right] = True
        # A stride past the crop would leave gaps; these strides do not.
        assert covered.all()


@pytest.mark.parametrize("size", [(336, 448), (560, 1120)])
def test_windows_of_usual_pictures(size: tuple[int, int]) -> None:
    assert len(sliding_windows(*size, 224, 112)) == {336: 2 * 3, 560: 4 * 9}[size[0]]
    assert len(sliding_windows(*size, 0, 112)) == 1


@pytest.mark.parametrize("target", [1, 3, 7, 40, 41])
def test_the_matrix_of_a_resize_is_torchs(target: int) -> None:
    source = torch.randn(1, 2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = functional.interpolate(source, target, mode="linear", align_corners=False)
    assert (source @ bilinear_matrix(7, target).T - expected).abs().max() < 1e-12


@pytest.mark.parametrize("size", [(40, 56), (48, 72), (33, 64), (20, 31)])
@pytest.mark.parametrize(("crop", "stride"), [(32, 16), (32, 9)])
def test_two_products_are_enlarging_the_mean_and_resizing(size: tuple[int, int], crop: int, stride: int) -> None:
    windows = sliding_windows(*size, crop, stride)
    generator = torch.Generator().manual_seed(0)
    grids = torch.rand(len(windows), 3, 4, 5, generator=generator, dtype=torch.float64)
    total, count = torch.zeros(3, *size, dtype=torch.float64), torch.zeros(*size, dtype=torch.float64)
    for grid, (top, bottom, left, right) in zip(grids, windows, strict=True):
        total[:, top:bottom, left:right] += resized_by_torch(grid, (bottom - top, right - left))
        count[top:bottom, left:right] += 1
    logits, expected = WindowLogits(grids, windows, *size), total / count
    assert (logits.mean()(0, size[0]) - expected).abs().max() < 1e-12
    rows = logits.resized((61, 45), whole=False)
    bands = torch.cat([rows(first, min(first + 7, 61)) for first in range(0, 61, 7)], dim=1)
    assert (bands - resized_by_torch(expected, (61, 45))).abs().max() < 1e-12


def test_a_whole_picture_is_resized_in_one_step() -> None:
    grids = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = WindowLogits(grids, sliding_windows(40, 50, 0, 1), 40, 50).resized((33, 71), whole=True)
    assert (rows(0, 33) - resized_by_torch(grids[0], (33, 71))).abs().max() < 1e-12


def resized_by_torch(values: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(values[None], size, mode="bilinear", align_corners=False)[0]


def random_logits(queries: int, height: int, width: int) -> WindowLogits:
    windows = sliding_windows(height, width, 32, 16)
    generator = torch.Generator().manual_seed(0)
    return WindowLogits(torch.rand(len(windows), queries, 4, 4, generator=generator), windows, height, width)


class LargestTensor(TorchDispatchMode):
    """Notes the most values of any tensor that an operator returns."""

    values = 0

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = operator(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor):
                # Views, and shapes that are only pretended, hold no values of their own.
                self.values = max(self.values, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("area_threshold", [0.0, 0.1])
def test_memory_is_a_band_whatever_the_size(monkeypatch: pytest.MonkeyPatch, area_threshold: float) -> None:
    queries, size, band = 40, (200, 300), 2**15
    monkeypatch.setattr(segmenter, "_BAND", band)
    recipe = Recipe(short_side=48, crop=32, stride=16, area_threshold=area_threshold)
    picture = torch.zeros(3, 48, 72)
    with torch.no_grad(), LargestTensor() as largest:  # type: ignore[no-untyped-call]
        logits = PictureLogits(random_logits(queries, 48, 72), picture, size, recipe)
        for _ in probability_bands(logits, Queries(torch.empty(0), (1,) * queries), recipe):
            pass
    # Counting areas keeps one label a pixel; nothing is as large as the logits of all pixels.
    assert largest.values <= max(2 * band, 2 * size[0] * size[1])
    assert largest.values < queries * size[0] * size[1] / 10


def test_refinement_takes_queries_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from cosmos_scale.evaluation.segmentation import refine as module

    generator = torch.Generator().manual_seed(0)
    logits, picture = torch.rand(5, 14, 17, generator=generator), torch.rand(3, 14, 17, generator=generator)
    whole = refine(logits, picture, (1, 3), 4)
    monkeypatch.setattr(module, "_CHUNK", 2 * 14 * 17)
    assert torch.equal(refine(logits, picture, (1, 3), 4), whole)
    expected = oracle.pamr(picture.double().numpy(), logits.double().numpy(), (1, 3), 4)
    assert np.abs(whole.numpy() - expected).max() < 2e-5  # the golden file's tolerance
