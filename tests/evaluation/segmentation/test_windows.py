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
from cosmos_scale.evaluation.segmentation.windows import WindowLogits, resized_rows, sliding_windows
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


@pytest.mark.parametrize("size", [(3, 5), (7, 9), (40, 22), (41, 67)])
def test_rows_of_a_resize_are_torchs_rows(size: tuple[int, int]) -> None:
    source = torch.randn(4, 7, 9, generator=torch.Generator().manual_seed(0))
    whole = functional.interpolate(source[None], size, mode="bilinear", align_corners=False)[0]
    for step in (1, 2, 5, 100):
        bands = [
            resized_rows(lambda first, last: source[:, first:last], 7, size, first, min(first + step, size[0]))
            for first in range(0, size[0], step)
        ]
        assert (torch.cat(bands, 1) - whole).abs().max() < 5e-6  # torch finds the places in float32


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
