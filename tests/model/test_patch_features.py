"""Features of single patches: those of training's pass, correlative self-attention, and what no call leaves behind."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cosmos_scale.config import VisionConfig
from cosmos_scale.model.packing import pack_crops
from cosmos_scale.model.vision import VisionTower, interpolation_matrix

TOLERANCE = 1e-12  # float64 throughout; only the order of summation differs
SIZES = [(16, 16), (24, 16), (18, 31)]


def tower_of(layers: int, dtype: torch.dtype = torch.float64) -> VisionTower:
    config = VisionConfig(image_size=16, patch_size=4, width=16, layers=layers, head_width=8)
    tower = VisionTower(config, embed_dim=8, pooler_heads=2).to(dtype)
    tower.init_weights(torch.Generator().manual_seed(0))
    return tower


def images(height: int, width: int) -> Tensor:
    return torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
def test_plain_features_are_those_of_the_usual_pass(size: tuple[int, int]) -> None:
    tower = tower_of(2)
    pooled, patches = tower.patch_features(images(*size))
    usual, tokens = tower([images(*size)], tokens_of=3)
    torch.testing.assert_close(pooled, usual, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(patches.flatten(0, 1), tokens @ tower.proj, rtol=0, atol=TOLERANCE)
    assert patches.shape == (3, size[0] // 4 * (size[1] // 4), 8)


@pytest.mark.parametrize("size", SIZES)
def test_correlative_attention_adds_two_softmaxes_in_the_last_block_alone(size: tuple[int, int]) -> None:
    tower = tower_of(3)
    first_two, last = tower.transformer.blocks()[:2], tower.transformer.blocks()[2]
    seen: list[Tensor] = []
    handle = first_two[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    pooled, patches = tower.patch_features(images(*size), correlative=True)
    tower([images(*size)])
    handle.remove()
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=TOLERANCE)  # all blocks before the last are as usual

    x_BLD = seen[0].unflatten(0, (3, -1))
    stacked = functional.linear(last.ln_1(x_BLD), last.attn.in_proj_weight, last.attn.in_proj_bias)
    q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in stacked.chunk(3, dim=-1))
    weights = sum((torch.softmax(one @ one.mT / 8**0.5, dim=-1) for one in (q, k)), torch.zeros(()))
    torch.testing.assert_close(weights.sum(-1), torch.full_like(weights[..., 0], 2.0), rtol=0, atol=TOLERANCE)
    x_BLD = x_BLD + last.attn.out_proj((weights @ v).transpose(1, 2).flatten(2))
    x_BLD = x_BLD + last.mlp(last.ln_2(x_BLD))
    expected = tower.ln_post(x_BLD) @ tower.proj
    torch.testing.assert_close(pooled, expected[:, 0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(patches, expected[:, 1:], rtol=0, atol=TOLERANCE)


def test_a_compiled_tower_gives_the_same() -> None:
    """Its blocks are compiled by parts for training; the correlative block runs as it is."""
    tower = tower_of(1)
    expected = tower.patch_features(images(24, 16), correlative=True)
    for block in tower.transformer.blocks():
        block.compile_parts()
    for ours, theirs in zip(tower.patch_features(images(24, 16), correlative=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_pictures_of_many_sizes_leave_nothing_behind() -> None:
    tower = tower_of(1)
    before = interpolation_matrix.cache_info().currsize, pack_crops.cache_info().currsize
    for height in range(20, 40, 4):
        tower.patch_features(images(height, 20))
    assert (interpolation_matrix.cache_info().currsize, pack_crops.cache_info().currsize) == before


@pytest.mark.parametrize("correlative", [False, True])
def test_low_precision_goes_the_way_of_the_kernels(correlative: bool) -> None:
    """On "meta" the Triton kernels serve bfloat16, as on a GPU: shapes and dtypes are those of the plain way."""
    tower = tower_of(2, torch.bfloat16).to("meta")
    pooled, patches = tower.patch_features(torch.empty(3, 3, 24, 16, device="meta"), correlative=correlative)
    assert (pooled.shape, patches.shape, patches.dtype) == ((3, 8), (3, 24, 8), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("correlative", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_features_of_the_cpu(dtype: torch.dtype, correlative: bool) -> None:
    config = VisionConfig(image_size=64, patch_size=16, width=128, layers=2, head_width=64)
    tower = VisionTower(config, embed_dim=64, pooler_heads=8)
    tower.init_weights(torch.Generator().manual_seed(0))
    pictures = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = tower.patch_features(pictures, correlative=correlative)[1]
        ours = tower.to("cuda", dtype).patch_features(pictures.to("cuda"), correlative=correlative)[1]
    # bfloat16 keeps 8 bits, float32 on a GPU may multiply in TF32, which keeps 11.
    tolerance = 5e-2 if dtype == torch.bfloat16 else 5e-3
    assert (ours.float().cpu() - expected).norm() <= tolerance * expected.norm()
