"""The project's Triton kernels as training launches them, in families, each compiled for GPUs that are not here.

`python -m cosmos_scale.testing.launched_kernels [FAMILY ...]` prints a json line a kernel and GPU.
"""

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import triton

from cosmos_scale.kernels import (
    shard_table,
    triton_adamw_ema,
    triton_bias,
    triton_colour,
    triton_contrastive,
    triton_norm,
    triton_patches,
    triton_sums,
)
from cosmos_scale.testing.gpu_compile import LaunchedKernel, check

WIDTH = 512  # of features: ViT-B's
PATCH_SIZE, SIDES = 16, (224, 96)  # ViT-B/16's, and of the crops in pixels
WIDTHS = (512, 768, 1024, 1280)  # of towers
TOKENS = 39424  # of a batch of 64 samples


def contrastive_kernels(tiles: triton_contrastive.TileSizes = triton_contrastive.TILES) -> Iterator[LaunchedKernel]:
    """Yield the loss's kernels with the launch parameters that training uses: bfloat16 features of ViT-B's width."""
    features, numbers = ("*bf16", "*bf16"), ("*fp32",)
    yield LaunchedKernel(
        "contrastive statistics",
        triton_contrastive.statistics_kernel,
        (*features, *numbers * 4, *("i32",) * 6),
        triton_contrastive.statistics_constants(tiles, WIDTH),
        tiles.warps,
        tiles.stages,
        multiplies=True,
    )
    yield LaunchedKernel(
        "contrastive slopes",
        triton_contrastive.slopes_kernel,
        (*features, "*fp32", "*fp64", *numbers * 3, *("i32",) * 14),
        triton_contrastive.slopes_constants(tiles, WIDTH),
        tiles.warps,
        tiles.stages,
        multiplies=True,
    )


def crop_kernels() -> Iterator[LaunchedKernel]:
    """Yield the kernels of crops as they come from a batch and from DALI, for ViT-B/16's sizes and bfloat16 patches."""
    for side in SIDES:
        yield LaunchedKernel(
            f"patches of {side} pixels",
            triton_patches.patches_kernel,
            ("*u8", "*bf16", "*bf16"),
            triton_patches.patches_constants(3, side, side, PATCH_SIZE),
            triton_patches.WARPS,
            1,
            multiplies=False,
        )
    pixels, plans, rows = "*u8", "*fp32", "*i64"
    size = {"PIXELS": triton_colour.PIXELS}
    blocks = {"BLOCKS": triton.next_power_of_2(triton.cdiv(SIDES[0] ** 2, triton_colour.PIXELS))}
    for name, function, types, constants in (
        ("grey sums", triton_colour.grey_sums_kernel, (pixels, plans, "*i32", "i32"), size),
        ("recolour", triton_colour.recolour_kernel, (pixels, plans, "*i32", pixels, "i32", "i32"), size | blocks),
        (
            "box blur",
            triton_colour.box_blur_kernel,
            (pixels, rows, pixels, rows, plans, plans, "i32", "i32", "i32"),
            size | {"ALONG_WIDTH": 1},
        ),
    ):
        yield LaunchedKernel(
            name, function, types, constants, triton_colour.WARPS, 1, multiplies=False, fp_fusion=False
        )


def optimizer_kernels(*, aligned: bool = True) -> Iterator[LaunchedKernel]:
    """Yield the optimizer's kernels as stages 1 to 3 launch them in bfloat16, and stage 0 for hundreds of parameters.

    aligned: whether all shards begin where wide accesses may begin; DeepSpeed's do.
    """
    numbers = {"gradient_factor": None, **triton_adamw_ema.numbers_constants(0.9, 0.98)}
    types = (*("*fp32",) * 3, "fp32", "fp32")
    yield LaunchedKernel("optimizer numbers", triton_adamw_ema.numbers_kernel, types, numbers, 1, 3, multiplies=False)
    blocks, access = triton_adamw_ema.BLOCKS, shard_table.ALIGNMENT if aligned else 0
    for where, shards in (("flat", 1), ("listed", 215)):
        for name, average_first in (("published order", True), ("average last", False)):
            constants = triton_adamw_ema.update_constants(
                shards,
                torch.bfloat16,
                torch.bfloat16,
                weight_copies=True,
                average_copies=True,
                average_first=average_first,
                clamps=False,
                aligned=aligned,
            )
            yield LaunchedKernel(
                f"optimizer update, {where}, {name}",
                triton_adamw_ema.update_kernel,
                ("*i64", "*fp32", *("fp32",) * 8),
                constants,
                blocks.warps,
                3,
                multiplies=False,
                least_access=access,
            )
        yield LaunchedKernel(
            f"gradient squares, {where}",
            triton_adamw_ema.squares_kernel,
            ("*i64", "*fp32"),
            triton_adamw_ema.squares_constants(shards, torch.bfloat16, aligned=aligned),
            blocks.warps,
            3,
            multiplies=False,
            least_access=access,
        )


def pointwise_kernels() -> Iterator[LaunchedKernel]:
    """Yield the kernels around products and attention, as bfloat16 training launches them; every width in WIDTHS."""
    low, numbers, warps, stages = "*bf16", "*fp32", triton_sums.WARPS, triton_sums.STAGES
    for D in WIDTHS:
        rows, columns, *_ = triton_norm.norm_tiling(TOKENS, D)
        sizes = {"D": D, "ROWS": rows, "COLUMNS": columns}
        yield LaunchedKernel(
            f"add and norm, width {D}",
            triton_norm.add_norm_kernel,
            (low, low, numbers, numbers, low, low, numbers, numbers, "i32", "fp32"),
            sizes | {"ADDS": True, "SAVES": True},
            warps,
            stages,
            multiplies=False,
        )
        yield LaunchedKernel(
            f"add and norm backward, width {D}",
            triton_norm.add_norm_backward_kernel,
            (*(low,) * 3, *(numbers,) * 3, low, numbers, "i32", "i32"),
            sizes | {"JOINS": True, "SUMS_BIAS": True},
            warps,
            stages,
            multiplies=False,
        )
        rows, columns, *_ = triton_bias.columns_tiling(TOKENS, 4 * D)
        yield LaunchedKernel(
            f"gelu backward, width {4 * D}",
            triton_bias.gelu_backward_kernel,
            (*(low,) * 3, numbers, "i32", "i32"),
            {"W": 4 * D, "ROWS": rows, "COLUMNS": columns},
            warps,
            stages,
            multiplies=False,
        )
        rows, columns, *_ = triton_bias.columns_tiling(TOKENS, D, 3)
        yield LaunchedKernel(
            f"stack of gradients, width {D}",
            triton_bias.stack_gradients_kernel,
            (*(low,) * 4, numbers, "i32", "i32"),
            {"STRIDE": D, "D": D, "ROWS": rows, "COLUMNS": columns, "STORES": True},
            warps,
            stages,
            multiplies=False,
        )
        yield LaunchedKernel(
            f"sum of partial sums, width {D}",
            triton_sums.sum_partials_kernel,
            (numbers, *(low,) * 3, "i32", "i32"),
            triton_sums.sum_constants(D),
            triton_sums.SECOND_WARPS,
            stages,
            multiplies=False,
        )


FAMILIES: dict[str, Callable[[], Iterator[LaunchedKernel]]] = {
    "contrastive": contrastive_kernels,
    "crops": crop_kernels,
    "optimizer": optimizer_kernels,
    "pointwise": pointwise_kernels,
}


def main(names: Sequence[str]) -> int:
    """Check the families of some names, or all; returns 1 where a kernel does not fit a GPU."""
    return check(kernel for name in names or FAMILIES for kernel in FAMILIES[name]())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
