"""Colour of a batch's crops, as DALI cuts them: by Triton kernels on a GPU, else by batched torch. Same levels in both.

Of a batch of 64 samples by the published plan the kernels are 28 launches, torch's operators some 1,100.
"""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from cosmos_scale.data.decode.batched_colour import BLUR_PASSES, box_weights, colour_, hue_steps
from cosmos_scale.data.samples.view_plan import CONTRAST, HUE, NO_JITTER, NO_SOLARISE


def colour_crops_(
    result_VBCHW: Tensor,
    pixels_BHWC: Sequence[Tensor],
    jitter_order: Tensor,
    jitter_factors: Tensor,
    grey: Tensor,
    blur_radius: Tensor,
    solarise: Tensor,
    *,
    triton: bool = True,
) -> None:
    """Jitter, grey, blur and solarise the crops of V views of one size, each by its own plan, and write the result.

    result: [V, B, 3, H, W] uint8. pixels: for each view [B, H, W, 3] uint8 on the result's device. The other arguments,
    with V x B rows, are the fields of a ViewPlan on the CPU. triton: whether the Triton kernels may serve. The host
    waits for no device.
    """
    plan = (jitter_order, jitter_factors, grey, blur_radius, solarise)
    if triton and _is_fused(result_VBCHW):
        colour_by_kernels_(result_VBCHW, pixels_BHWC, *plan)
        return
    levels_VBCHW = torch.empty(result_VBCHW.shape, device=result_VBCHW.device)
    for levels, pixels in zip(levels_VBCHW, pixels_BHWC, strict=True):
        levels.copy_(pixels.permute(0, 3, 1, 2))
    colour_(levels_VBCHW.flatten(0, 1), *plan)
    result_VBCHW.copy_(levels_VBCHW)


def colour_by_kernels_(
    result_VBCHW: Tensor,
    pixels_BHWC: Sequence[Tensor],
    jitter_order: Tensor,
    jitter_factors: Tensor,
    grey: Tensor,
    blur_radius: Tensor,
    solarise: Tensor,
) -> None:
    """Do what `colour_crops_` does, by Triton kernels."""
    from cosmos_scale.kernels import triton_colour  # here: triton is there on Linux with a GPU build of torch only

    blurred = blur_radius > 0
    thresholds = torch.where(blurred, NO_SOLARISE, solarise)  # those of blurred crops come after the blur
    parameters = _send(_parameters(jitter_order, jitter_factors, grey, thresholds), result_VBCHW.device)
    per_view = parameters.unflatten(0, (-1, result_VBCHW.shape[1])) if len(parameters) else ()
    for result, pixels, own in zip(result_VBCHW, pixels_BHWC, per_view, strict=True):
        triton_colour.recolour_(result, pixels, own, triton_colour.grey_sums(pixels, own))
    rows = blurred.nonzero()[:, 0]
    if len(rows):
        _blur_(result_VBCHW.flatten(0, 1), rows, blur_radius[rows], solarise[rows])


def _parameters(order_N4: Tensor, factors_N4: Tensor, grey_N: Tensor, thresholds_N: Tensor) -> Tensor:
    """Return what the kernels read of the plans: [N, 11] float32; see kernels/triton_colour.py."""
    active_N4 = factors_N4 != factors_N4.new_tensor(NO_JITTER)
    operations_N4 = torch.where(active_N4.gather(1, order_N4), order_N4, -1)
    factors_N4 = factors_N4.clone()
    factors_N4[:, HUE] = hue_steps(factors_N4[:, HUE])
    is_contrast_N4 = operations_N4 == CONTRAST
    contrast_at_N = torch.where(is_contrast_N4.any(1), is_contrast_N4.int().argmax(1), order_N4.shape[1])
    columns = (operations_N4, factors_N4.gather(1, order_N4), *(of[:, None] for of in (contrast_at_N, grey_N)))
    return torch.cat([column.float() for column in (*columns, thresholds_N[:, None])], dim=1)


def _blur_(levels_NCHW: Tensor, rows: Tensor, radius: Tensor, thresholds: Tensor) -> None:
    """Blur and solarise some crops, along the width and then along the height, in memory beside them."""
    from cosmos_scale.kernels import triton_colour

    device = levels_NCHW.device
    place, beside = _send(torch.stack([rows, torch.arange(len(rows))]), device)
    none, limit = _send(torch.stack([torch.full_like(thresholds, NO_SOLARISE), thresholds]).float(), device)
    weights = _send(box_weights(radius.double()).float(), device)
    source, source_rows = levels_NCHW, place
    spare = [levels_NCHW.new_empty((len(rows), *levels_NCHW.shape[1:])) for _ in range(2)]
    passes = [True] * BLUR_PASSES + [False] * BLUR_PASSES
    for number, along_width in enumerate(passes, start=1):
        is_last = number == len(passes)
        target, target_rows = (levels_NCHW, place) if is_last else (spare[number % 2], beside)
        limits = limit if is_last else none
        triton_colour.box_blur_(target, target_rows, source, source_rows, weights, limits, along_width)
        source, source_rows = target, target_rows


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; through pinned memory, since from other memory CUDA may let the host wait."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _is_fused(result: Tensor) -> bool:
    """Tell whether the Triton kernels serve: on a GPU, or on "meta" for counts."""
    return (result.is_cuda or result.is_meta) and importlib.util.find_spec("triton") is not None
