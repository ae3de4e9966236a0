"""The image tower's parts against second implementations: patches, and positions for crops of other sizes."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cosmos_scale.config import VisionConfig
from cosmos_scale.model.vision import PatchEmbedding, VisionTower, interpolation_matrix

# float64 throughout; only the order of summation differs.
TOLERANCE = 1e-12


def bicubic(table: Tensor, rows: int, columns: int) -> Tensor:
    """Interpolate a [side, side, D] table: Keys' cubic (a = -0.75), clamped borders, pixel centres at 1/2.

    Output i looks at (i + 1/2) / scale - 1/2 in the table, scale = (size + 0.1) / side.
    """
    side, a = table.shape[0], -0.75

    def weights(outputs: int) -> Tensor:
        matrix = torch.zeros(outputs, side, dtype=torch.float64)
        for i in range(outputs):
            centre = (i + 0.5) * side / (outputs + 0.1) - 0.5
            for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
                d = abs(centre - j)
                near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
                matrix[i, min(max(j, 0), side - 1)] += near if d <= 1 else far
        return matrix

    return torch.einsum("ri,cj,ijd->rcd", weights(rows), weights(columns), table)


def small_tower(image_size: int, patch_size: int = 4) -> VisionTower:
    config = VisionConfig(image_size=image_size, patch_size=patch_size, width=16, layers=1, head_width=8)
    tower = VisionTower(config, embed_dim=8, pooler_heads=2).double()
    tower.init_weights(torch.Generator().manual_seed(0))
    return tower


def positions(tower: VisionTower, height: int, width: int) -> Tensor:
    """Read the positions off the input of ln_pre, for black images and a class token of 0."""
    seen: list[Tensor] = []
    handle = tower.ln_pre.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    torch.nn.init.zeros_(tower.class_embedding)
    tower([torch.zeros(1, 3, height, width)])
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("side", "rows", "columns"),
    [(14, 6, 6), (7, 3, 3), (5, 9, 9), (3, 1, 1), (4, 2, 3), (2, 3, 7), (4, 2, 8), (4, 4, 5)],
)
def test_other_crop_sizes_interpolate_the_table(side: int, rows: int, columns: int) -> None:
    tower = small_tower(4 * side)
    table = tower.positional_embedding
    expected = bicubic(table[1:].detach().reshape(side, side, -1), rows, columns).flatten(0, 1)
    ours = positions(tower, 4 * rows, 4 * columns)
    torch.testing.assert_close(ours[1:], expected, rtol=0, atol=TOLERANCE)
    assert torch.equal(ours[0], table[0])

    # The gradient flows into the table: the transposed interpolation, and the class row as it is.
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (ours * weights).sum().backward()
    oracle = table.detach()[1:].reshape(side, side, -1).requires_grad_()
    (bicubic(oracle, rows, columns).flatten(0, 1) * weights[1:]).sum().backward()
    assert table.grad is not None
    assert oracle.grad is not None
    torch.testing.assert_close(table.grad[1:], oracle.grad.flatten(0, 1), rtol=0, atol=TOLERANCE)
    assert torch.equal(table.grad[0], weights[0])


@pytest.mark.parametrize("pixels", [20, 22])  # 22: the same patches, with pixels left over
def test_own_size_leaves_the_table_untouched(pixels: int) -> None:
    tower = small_tower(20)
    assert torch.equal(positions(tower, pixels, pixels), tower.positional_embedding)


def test_low_precision_tables_are_interpolated_in_float32() -> None:
    tower = small_tower(28).bfloat16()
    table = tower.positional_embedding.detach().double()
    expected = bicubic(table[1:].reshape(7, 7, -1), 3, 3).flatten(0, 1)
    ours = positions(tower, 12, 12)[1:]
    # Half a unit in the last place of bfloat16 (8 bits) is all that is lost.
    torch.testing.assert_close(ours.double(), expected, rtol=2**-8, atol=1e-6)


def test_a_matrix_first_asked_for_in_inference_mode_serves_training() -> None:
    interpolation_matrix.cache_clear()
    tower = small_tower(16)
    with torch.inference_mode():
        tower([torch.zeros(1, 3, 8, 8)])
    pooled, _ = tower([torch.zeros(1, 3, 8, 8)])
    pooled.sum().backward()
    assert tower.positional_embedding.grad is not None


@pytest.mark.parametrize(("height", "width"), [(12, 12), (14, 21), (23, 7)])
def test_patches_equal_the_convolution(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = PatchEmbedding(10, 7).double()
    torch.nn.init.normal_(embedding.weight, generator=generator)
    images = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
    expected = functional.conv2d(images, embedding.weight, stride=7).flatten(2).transpose(1, 2)
    smaller, ours = embedding([images[..., :7, :7], images])
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(smaller, expected[:, :1], rtol=0, atol=TOLERANCE)


def test_tokens_are_those_of_the_first_images_without_the_class_token() -> None:
    tower = small_tower(16)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pooled, tokens = tower([images], tokens_of=2)
    alone, all_tokens = tower([images[1:2]], tokens_of=1)
    assert (pooled.shape, tokens.shape) == ((3, 8), (2 * 16, 16))
    torch.testing.assert_close(pooled[1:2], alone, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(tokens[16:], all_tokens, rtol=0, atol=TOLERANCE)


def test_crops_of_several_sizes_in_one_pass_equal_each_size_alone() -> None:
    tower = small_tower(16)
    generator = torch.Generator().manual_seed(0)
    crops = [torch.randn(count, 3, side, side, generator=generator) for count, side in ((2, 16), (3, 8), (1, 12))]
    pooled, tokens = tower(crops, tokens_of=2)
    assert tokens.shape == (2 * 16, 16)
    alone = torch.cat([tower([images])[0] for images in crops])
    torch.testing.assert_close(pooled, alone, rtol=0, atol=TOLERANCE)
