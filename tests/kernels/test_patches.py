"""Crops of 8-bit levels cut into normalised patches: the bits of normalising first and cutting then, in both forms."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cosmos_scale.batch import MEAN, STD
from cosmos_scale.engine.pair import drawn_pair
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.kernels.patches import cut_patches, level_values, normalised_patches
from cosmos_scale.profiling.operators import Count, DeviceCounter
from cosmos_scale.testing.device_counts import count_step
from cosmos_scale.testing.tiny import tiny_config
from tests.kernels.programs import json_lines, needs_triton

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def some_crops(*shapes: tuple[int, int, int], device: str = "cpu") -> list[Tensor]:
    """Crops of all levels: a tensor [B, 3, H, W] for each (B, H, W)."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (B, 3, H, W), generator=generator, dtype=torch.uint8).to(device) for B, H, W in shapes
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_level_has_its_normalised_value(dtype: torch.dtype) -> None:
    exact = (np.arange(256) / 255 - np.array(MEAN)[:, None]) / np.array(STD)[:, None]
    values = level_values(MEAN, STD, dtype)
    assert values.dtype == dtype
    # The rounding of float32, and of the dtype after it.
    assert torch.equal(values, torch.from_numpy(exact.astype(np.float32)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 4, 5, 16])
def test_patches_have_the_bits_of_normalised_crops(size: int, dtype: torch.dtype) -> None:
    """Two resolutions of other heights than widths, with pixels past the last whole patch."""
    crops = some_crops((3, 33, 47), (2, 16, 18))
    values = level_values(MEAN, STD, dtype)
    expected = []
    for images in crops:
        normalised = torch.stack([values[channel][images[:, channel].long()] for channel in range(3)], dim=1)
        expected.append(cut_patches(normalised, size).flatten(0, 1))
    assert torch.equal(normalised_patches(crops, size, values), torch.cat(expected))


def test_crops_smaller_than_a_patch_and_no_crops_have_no_patches() -> None:
    values = level_values(MEAN, STD, torch.float32)
    assert normalised_patches(some_crops((2, 3, 9), (0, 8, 8)), 4, values).shape == (0, 48)


@needs_triton
def test_the_interpreted_kernel_has_the_same_bits() -> None:
    rows = json_lines("-m", "tests.kernels.interpret_patches", interpret=True)
    assert len(rows) == 5
    assert [row for row in rows if not row["equal"]] == []


@needs_triton
def test_the_kernel_reads_each_level_and_writes_each_value_once() -> None:
    crops, values = some_crops((2, 32, 32), (4, 16, 16), device="meta"), level_values(MEAN, STD, torch.bfloat16)
    counters = {}
    for triton in (True, False):
        with DeviceCounter() as counters[triton]:
            normalised_patches(crops, 16, values.to("meta"), triton=triton)
    levels = sum(images.numel() for images in crops)
    assert counters[True].counts["", "write_patches_"] == Count(2, levels + 2 * values.nbytes, 2 * levels)
    assert ("", "write_patches_") not in counters[False].counts


@needs_triton
def test_the_config_says_whether_the_kernel_serves() -> None:
    for kernels, served in (("auto", True), ("torch", False)):
        config = tiny_config(kernels=kernels)
        counter = count_step(config, torch.full((config.data.captions.count, config.train.global_batch), 4))
        launched = {phase for phase, operator in counter.counts if operator == "write_patches_"}
        assert launched == ({"student", "teacher"} if served else set())
        student, teacher = drawn_pair(config, start_ranks("cpu"))
        for model in (student.model, teacher.model):
            assert model.visual.conv1.triton == served
        student.layout.close()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "sides"), [(16, (224, 96)), (32, (224, 96)), (14, (224, 98)), (5, (33, 17))])
def test_a_gpu_has_the_same_bits(size: int, sides: tuple[int, int], dtype: torch.dtype) -> None:
    crops, values = some_crops((4, sides[0], sides[0]), (6, sides[1], sides[1])), level_values(MEAN, STD, dtype)
    there = [images.cuda() for images in crops]
    for triton in (True, False):
        assert torch.equal(
            normalised_patches(there, size, values.cuda(), triton=triton).cpu(), normalised_patches(crops, size, values)
        )
