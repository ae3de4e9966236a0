"""Colour of 8-bit crops in few passes: jitter, grey, solarisation and blur by Triton kernels, each crop by a plan.

A jitter's contrast needs the mean grey of the crop as the operations before it leave the crop. So `grey_sums` runs
first, and `recolour_` does all operations in each crop's order and writes the channels one after the other. A blur is
six launches of `box_blur_`, whose rounding to 8 bits after each Pillow's blur has too.

The arithmetic is that of batched_colour.py in data/decode, which says whose it is and why it is exact: levels are whole
numbers in float32, and hues need float64 and divisions that round as the standard for floating point says.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 1024  # that one program takes
WARPS = 4
# A product and a sum rounded once would cut some levels otherwise than Pillow does.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}
# Columns of `parameters`: four operations (0 brightness, 1 contrast, 2 saturation, 3 hue, -1 none), their four factors
# (of hue: steps of 256), the place of contrast among the operations (4: none), whether grey, the threshold of
# solarisation (256: none).
COLUMNS = tl.constexpr(11)
CONTRAST_AT, GREY, SOLARISE = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10)


@triton.jit
def grey_of(red, green, blue):
    """Return Pillow's grey of pixels: ITU-R 601-2 weights in 65536ths, rounded."""
    return tl.floor((red * 19595.0 + green * 38470.0 + blue * 7471.0 + 32768.0) * (1.0 / 65536.0))


@triton.jit
def turned(hue, saturation, value, offset):
    """Return a channel of turned pixels: it falls from value to value * (1 - saturation) and rises again."""
    along = 2.0 * hue + offset
    along = tl.where(along >= 510.0, along - 510.0, along)
    fall = tl.minimum(tl.maximum(tl.minimum(along, 340.0 - along), 0.0), 85.0)
    return tl.floor(tl.div_rn((21675.0 - saturation * fall) * value, tl.full(value.shape, 21675.0, tl.float32)) + 0.5)


@triton.jit
def turn_hue(red, green, blue, turn):
    """Turn the hue of pixels by whole steps of Pillow's 8-bit HSV."""
    value = tl.maximum(tl.maximum(red, green), blue)
    chroma = value - tl.minimum(tl.minimum(red, green), blue)
    divisor = tl.maximum(chroma, 1.0)
    to_red = tl.div_rn(value - red, divisor).to(tl.float64)
    to_green = tl.div_rn(value - green, divisor).to(tl.float64)
    to_blue = tl.div_rn(value - blue, divisor).to(tl.float64)
    beside_green = tl.where(green == value, to_red - to_blue + 2.0, to_green - to_red + 4.0)
    sixths = tl.where(red == value, to_blue - to_green, beside_green).to(tl.float32).to(tl.float64)
    turns = sixths / 6.0 + 1.0
    turns = (turns - tl.floor(turns)).to(tl.float32)
    hue = tl.floor(turns.to(tl.float64) * 255.0).to(tl.float32)
    saturation = tl.floor(tl.div_rn(chroma, tl.maximum(value, 1.0)).to(tl.float64) * 255.0).to(tl.float32)
    hue += turn
    hue = tl.where(hue < 0.0, hue + 256.0, tl.where(hue >= 256.0, hue - 256.0, hue))
    return (
        turned(hue, saturation, value, 425.0),
        turned(hue, saturation, value, 255.0),
        turned(hue, saturation, value, 85.0),
    )


@triton.jit
def jittered(red, green, blue, operation, factor, mean):
    """Return pixels after one operation, cut to whole levels as Pillow does; mean: the grey that contrast keeps."""
    if operation == 0:
        red, green, blue = red * factor, green * factor, blue * factor
    elif operation == 1:
        red, green, blue = (red - mean) * factor + mean, (green - mean) * factor + mean, (blue - mean) * factor + mean
    elif operation == 2:
        grey = grey_of(red, green, blue)
        red, green, blue = (red - grey) * factor + grey, (green - grey) * factor + grey, (blue - grey) * factor + grey
    elif operation == 3:
        red, green, blue = turn_hue(red, green, blue, factor)
    red = tl.floor(tl.minimum(tl.maximum(red, 0.0), 255.0))
    green = tl.floor(tl.minimum(tl.maximum(green, 0.0), 255.0))
    blue = tl.floor(tl.minimum(tl.maximum(blue, 0.0), 255.0))
    return red, green, blue


@triton.jit
def grey_sums_kernel(
    pixels,  # [N, area, 3] uint8
    parameters,  # [N, COLUMNS]
    sums,  # [N, blocks] int32
    area,
    PIXELS: tl.constexpr,
):
    """Sum the grey of a stretch of a crop as contrast will find it; write nothing where there is no contrast."""
    crop, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own = parameters + crop * COLUMNS
    contrast_at = tl.load(own + CONTRAST_AT).to(tl.int32)
    if contrast_at < 4:
        place = block * PIXELS + tl.arange(0, PIXELS)
        exists = place < area
        source = pixels + (crop * area + place) * 3
        red = tl.load(source, mask=exists, other=0).to(tl.float32)
        green = tl.load(source + 1, mask=exists, other=0).to(tl.float32)
        blue = tl.load(source + 2, mask=exists, other=0).to(tl.float32)
        for step in range(0, contrast_at):
            operation, factor = tl.load(own + step), tl.load(own + 4 + step)
            red, green, blue = jittered(red, green, blue, operation, factor, 0.0)
        grey = tl.where(exists, grey_of(red, green, blue), 0.0).to(tl.int32)
        tl.store(sums + crop * tl.num_programs(1) + block, tl.sum(grey, 0))


@triton.jit
def recolour_kernel(
    pixels,  # [N, area, 3] uint8
    parameters,  # [N, COLUMNS]
    sums,  # [N, blocks] int32
    result,  # [N, 3, area] uint8
    area,
    blocks,
    PIXELS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Do all operations of a plan on a stretch of a crop, a blur excepted."""
    crop = tl.program_id(0).to(tl.int64)
    own = parameters + crop * COLUMNS
    mean = 0.0
    if tl.load(own + CONTRAST_AT) < 4.0:
        number = tl.arange(0, BLOCKS)
        total = tl.sum(tl.load(sums + crop * blocks + number, mask=number < blocks, other=0), 0)
        mean = tl.floor(total.to(tl.float64) / area + 0.5).to(tl.float32)
    place = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    exists = place < area
    source = pixels + (crop * area + place) * 3
    red = tl.load(source, mask=exists, other=0).to(tl.float32)
    green = tl.load(source + 1, mask=exists, other=0).to(tl.float32)
    blue = tl.load(source + 2, mask=exists, other=0).to(tl.float32)
    for step in range(0, 4):
        operation, factor = tl.load(own + step), tl.load(own + 4 + step)
        red, green, blue = jittered(red, green, blue, operation, factor, mean)
    if tl.load(own + GREY) > 0.0:
        grey = grey_of(red, green, blue)
        red, green, blue = grey, grey, grey
    threshold = tl.load(own + SOLARISE)
    target = result + crop * 3 * area + place
    tl.store(target, tl.where(red >= threshold, 255.0 - red, red).to(tl.uint8), mask=exists)
    tl.store(target + area, tl.where(green >= threshold, 255.0 - green, green).to(tl.uint8), mask=exists)
    tl.store(target + 2 * area, tl.where(blue >= threshold, 255.0 - blue, blue).to(tl.uint8), mask=exists)


@triton.jit
def box_blur_kernel(
    source,  # [N, 3, H, W] uint8
    source_rows,  # [R] which crops of source are blurred
    target,  # [M, 3, H, W] uint8
    target_rows,  # [R] which crops of target are written
    weights,  # [reach + 1, R]
    thresholds,  # [R] of solarisation afterwards; 256: none
    reach,
    H,
    W,
    ALONG_WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Blur a stretch of a crop by a box of fractional width along one axis; the border's pixels repeat outwards."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    first = source + tl.load(source_rows + row) * 3 * H * W
    place = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    exists = place < 3 * H * W
    if ALONG_WIDTH:
        at, last, stride = place % W, W - 1, 1
    else:
        at, last, stride = (place // W) % H, H - 1, W
    line = first + place - at * stride
    level = tl.load(line + at * stride, mask=exists, other=0).to(tl.float32)
    blurred = level * tl.load(weights + row)
    for distance in range(1, reach + 1):
        before = tl.load(line + tl.maximum(at - distance, 0) * stride, mask=exists, other=0).to(tl.float32)
        after = tl.load(line + tl.minimum(at + distance, last) * stride, mask=exists, other=0).to(tl.float32)
        blurred += (before + after) * tl.load(weights + distance * rows + row)
    blurred = tl.floor(blurred + 0.5)
    solarised = tl.where(blurred >= tl.load(thresholds + row), 255.0 - blurred, blurred)
    written = target + tl.load(target_rows + row) * 3 * H * W + place
    tl.store(written, solarised.to(tl.uint8), mask=exists)


@torch.library.custom_op("cosmos_scale::grey_sums", mutates_args=())
def grey_sums(pixels: Tensor, parameters: Tensor) -> Tensor:
    """Return sums of grey as contrast will find it, in stretches: [N, blocks] int32; arbitrary without contrast.

    pixels: [N, H, W, 3] uint8, contiguous. parameters: [N, 11] float32, contiguous: see COLUMNS.
    """
    sums = _empty_sums(pixels)
    N, H, W, _ = pixels.shape
    grey_sums_kernel[(N, sums.shape[1])](pixels, parameters, sums, H * W, PIXELS=PIXELS, **OPTIONS)
    return sums


@grey_sums.register_fake
def _(pixels: Tensor, parameters: Tensor) -> Tensor:
    return _empty_sums(pixels)


@torch.library.custom_op("cosmos_scale::recolour_", mutates_args=("result",))
def recolour_(result: Tensor, pixels: Tensor, parameters: Tensor, sums: Tensor) -> None:
    """Write crops [N, H, W, 3] after all operations of their plans but a blur into result [N, 3, H, W].

    result, pixels: uint8, contiguous. parameters and sums: as of `grey_sums`.
    """
    N, H, W, _ = pixels.shape
    blocks = sums.shape[1]
    constants = {"PIXELS": PIXELS, "BLOCKS": triton.next_power_of_2(blocks)}
    recolour_kernel[(N, blocks)](pixels, parameters, sums, result, H * W, blocks, **constants, **OPTIONS)


recolour_.register_fake(lambda *_: None)


@torch.library.custom_op("cosmos_scale::box_blur_", mutates_args=("target",))
def box_blur_(
    target: Tensor,
    target_rows: Tensor,
    source: Tensor,
    source_rows: Tensor,
    weights: Tensor,
    thresholds: Tensor,
    along_width: bool,
) -> None:
    """Blur R crops of source along one axis, solarise them, and write them into R crops of target.

    source, target: [N, 3, H, W] uint8, contiguous, of different memory. source_rows, target_rows: [R] int64, which
    crops. weights: [reach + 1, R] float32, of a pixel by its distance. thresholds: [R] float32; 256: no solarisation.
    """
    _, C, H, W = source.shape
    grid = (len(source_rows), triton.cdiv(C * H * W, PIXELS))
    box_blur_kernel[grid](
        *(source, source_rows, target, target_rows, weights, thresholds, len(weights) - 1, H, W),
        ALONG_WIDTH=along_width,
        PIXELS=PIXELS,
        **OPTIONS,
    )


box_blur_.register_fake(lambda *_: None)


def _empty_sums(pixels: Tensor) -> Tensor:
    N, H, W, _ = pixels.shape
    return pixels.new_empty((N, triton.cdiv(H * W, PIXELS)), dtype=torch.int32)
