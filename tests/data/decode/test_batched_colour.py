"""Batched colour against Pillow and torchvision, operation by operation and all together: equal to the bit."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter

from cosmos_scale.config import ViewsConfig
from cosmos_scale.data.decode.batched_colour import colour_
from cosmos_scale.data.samples.sample import SampleKey
from cosmos_scale.data.samples.view_plan import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    NO_JITTER,
    NO_SOLARISE,
    SATURATION,
    plan_views,
)
from cosmos_scale.testing.tolerances import tolerance
from tests.data.decode.test_torch_cpu import photo, reference_view

Plan = dict[str, torch.Tensor]

ADJUST: dict[int, Callable[[Image.Image, float], Image.Image]] = {
    BRIGHTNESS: TF.adjust_brightness,
    CONTRAST: TF.adjust_contrast,
    SATURATION: TF.adjust_saturation,
    HUE: TF.adjust_hue,
}
BLUR_MISSES = tolerance("colour, blurred, levels that differ", torch.uint8)


def plan(count: int, **changes: Any) -> Plan:
    """A plan that leaves `count` crops as they are, apart from the fields given."""
    neutral = {
        "jitter_order": torch.arange(4).repeat(count, 1),
        "jitter_factors": torch.tensor(NO_JITTER, dtype=torch.float64).repeat(count, 1),
        "grey": torch.zeros(count, dtype=torch.bool),
        "blur_radius": torch.zeros(count, dtype=torch.float64),
        "solarise": torch.full((count,), NO_SOLARISE),
    }
    return neutral | changes


def coloured(images: list[Image.Image], **fields: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The result of colour_ on pictures of one size: [N, H, W, 3]."""
    levels_NCHW = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float()
    levels_NCHW = levels_NCHW.contiguous()
    colour_(levels_NCHW, **fields)
    result: np.ndarray[Any, np.dtype[np.float32]] = levels_NCHW.permute(0, 2, 3, 1).numpy()
    return result


@pytest.mark.parametrize("operation", list(ADJUST))
def test_each_jitter_operation_is_pillows(operation: int) -> None:
    factors = np.linspace(-0.5, 0.5, 21) if operation == HUE else np.linspace(0, 2, 21)
    images = [photo(24, 41, seed=seed) for seed in range(len(factors))]
    fields = plan(len(images))
    fields["jitter_factors"][:, operation] = torch.from_numpy(factors)
    # A neutral factor leaves the operation out; torchvision's hue goes through 8-bit HSV even with a neutral factor.
    expected = [
        image if factor == NO_JITTER[operation] else ADJUST[operation](image, float(factor))
        for image, factor in zip(images, factors, strict=True)
    ]
    np.testing.assert_array_equal(coloured(images, **fields), np.stack([np.asarray(image) for image in expected]))


@pytest.mark.parametrize("turn", [-0.1, 0.037, 0.5])
def test_hue_of_every_kind_of_colour_is_pillows(turn: float) -> None:
    """All colours of a coarse grid, with its edges, where the truncations of HSV decide; and random ones."""
    steps = [*range(0, 256, 15), 1, 84, 86, 127, 128, 171, 254]
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    drawn = np.random.default_rng(0).integers(0, 256, (1, 50_000, 3))
    image = Image.fromarray(np.concatenate([grid, drawn], axis=1).astype(np.uint8))
    fields = plan(1)
    fields["jitter_factors"][0, HUE] = turn
    np.testing.assert_array_equal(coloured([image], **fields)[0], np.asarray(TF.adjust_hue(image, turn)))


@pytest.mark.parametrize("threshold", [0, 1, 128, 255, NO_SOLARISE])
def test_grey_and_solarise_are_pillows(threshold: int) -> None:
    images = [photo(30, 21, seed=seed) for seed in range(3)]
    grey = torch.tensor([True, False, True])
    fields = plan(3, grey=grey, solarise=torch.full((3,), threshold))
    for image, is_grey, ours in zip(images, grey.tolist(), coloured(images, **fields), strict=True):
        levels = np.asarray(image.convert("L").convert("RGB") if is_grey else image)
        np.testing.assert_array_equal(ours, np.where(levels >= threshold, 255 - levels, levels))


@pytest.mark.parametrize("size", [(40, 57), (5, 90), (3, 2), (1, 1)])
@pytest.mark.parametrize(("low", "high"), [(0.1, 2.0), (0.01, 0.1), (2.0, 9.0)])
def test_blur_is_pillows(size: tuple[int, int], low: float, high: float) -> None:
    generator = np.random.default_rng(0)
    radii = generator.uniform(low, high, 25)  # as plans draw them; round numbers would make many ties
    images = [Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)) for _ in radii]
    ours = coloured(images, **plan(25, blur_radius=torch.from_numpy(radii)))
    expected = [
        image.filter(ImageFilter.GaussianBlur(float(radius))) for image, radius in zip(images, radii, strict=True)
    ]
    difference = np.abs(ours - np.stack([np.asarray(image) for image in expected]))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= BLUR_MISSES


def test_whole_plans_in_every_order_are_pillows() -> None:
    """All operations of a plan but the resize, on 60 pictures in one batch."""
    views = ViewsConfig(global_crops=2, local_crops=2, local_size=48, solarise=1.0)
    images = [photo(48, 48, seed=seed) for seed in range(60)]
    plans = [plan_views(views, 48, SampleKey(0, 0, seed), 48, 48) for seed in range(60)]
    for each in plans:
        each.boxes[:] = (0, 0, 48, 48)
        each.flip[:] = False
    seen = set()
    for view in range(4):
        fields = {name: torch.from_numpy(np.stack([getattr(each, name)[view] for each in plans])) for name in plan(0)}
        seen |= {tuple(order) for order in fields["jitter_order"].tolist()}
        expected = [reference_view(image, each, view) for image, each in zip(images, plans, strict=True)]
        difference = np.abs(coloured(images, **fields) - np.stack([np.asarray(image) for image in expected]))
        assert (difference > 0).mean() <= BLUR_MISSES
    assert len(seen) == 24


def test_a_crop_does_not_see_its_batch() -> None:
    """The same bits alone, among other pictures, and at another place."""
    images = [photo(33, 33, seed=seed) for seed in range(12)]
    plans = [plan_views(ViewsConfig(solarise=1.0), 33, SampleKey(7, 0, seed), 99, 99) for seed in range(12)]
    fields = {name: torch.from_numpy(np.stack([getattr(each, name)[1] for each in plans])) for name in plan(0)}
    together = coloured(images, **fields)
    backwards = coloured(images[::-1], **{name: field.flip(0) for name, field in fields.items()})
    np.testing.assert_array_equal(together, backwards[::-1])
    for n, image in enumerate(images):
        alone = coloured([image], **{name: field[n : n + 1] for name, field in fields.items()})
        np.testing.assert_array_equal(alone[0], together[n])


def test_no_crops_are_no_trouble() -> None:
    assert coloured([photo(8, 8)] * 2, **plan(2)).shape == (2, 8, 8, 3)
    colour_(torch.empty(0, 3, 8, 8), **plan(0))
