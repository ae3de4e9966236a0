"""Colour of many crops at once, on any device: Pillow's and torchvision's 8-bit arithmetic in batched torch.

Levels are whole numbers 0..255 held as float32, rounded wherever the published pipeline stores 8 bits. Products and
sums of such numbers stay below 2^24, so that nearly all arithmetic is exact: a crop gets the same bits in any batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_scale.data.samples.view_plan import BRIGHTNESS, CONTRAST, HUE, NO_JITTER, NO_SOLARISE, SATURATION

LUMA = (19595.0, 38470.0, 7471.0)  # ITU-R 601-2 weights of red, green, blue, times 2^16
BLUR_PASSES = 3  # box blurs that stand for one Gaussian


def colour_(
    levels_NCHW: Tensor,
    jitter_order: Tensor,
    jitter_factors: Tensor,
    grey: Tensor,
    blur_radius: Tensor,
    solarise: Tensor,
) -> None:
    """Jitter, grey, blur and solarise N crops in place, each by its own plan.

    levels: [N, 3, H, W] float32, whole numbers 0..255. The other arguments, with N rows, are the fields of a ViewPlan
    on the CPU. The CPU decides which crops an operation concerns, so that nothing waits for the device.
    """
    _jitter_(levels_NCHW, jitter_order, jitter_factors)
    for chosen, parameters, operation in (
        (grey, grey, _to_grey),
        (blur_radius > 0, blur_radius, _blur),
        (solarise < NO_SOLARISE, solarise, _solarise),
    ):
        rows = chosen.nonzero()[:, 0]
        if len(rows):
            moved = rows.to(levels_NCHW.device, non_blocking=True)
            changed = operation(levels_NCHW.index_select(0, moved), parameters[rows])
            levels_NCHW.index_copy_(0, moved, changed)


def hue_steps(turns: Tensor) -> Tensor:
    """Return how far hues turn in Pillow's 8-bit HSV: torchvision's cast of the shift truncates towards zero."""
    return (turns * 255).trunc()


def _jitter_(levels_NCHW: Tensor, order_N4: Tensor, factors_N4: Tensor) -> None:
    """Each crop's operations in its own order: in every position, all crops that have the same operation there."""
    active_N4 = factors_N4 != factors_N4.new_tensor(NO_JITTER)
    factors_N4 = factors_N4.clone()
    factors_N4[:, HUE] = hue_steps(factors_N4[:, HUE])
    operations, rows, factors = [], [], []
    for order_N in order_N4.unbind(1):
        for operation in (BRIGHTNESS, CONTRAST, SATURATION, HUE):
            chosen = ((order_N == operation) & active_N4[:, operation]).nonzero()[:, 0]
            if len(chosen):
                operations.append(operation)
                rows.append(chosen)
                factors.append(factors_N4[chosen, operation].float())
    if not operations:
        return
    # Two copies to the device, not two for each of the up to 16 steps.
    sizes = [len(chosen) for chosen in rows]
    rows_there = torch.cat(rows).to(levels_NCHW.device, non_blocking=True).split(sizes)
    factors_there = torch.cat(factors).view(-1, 1, 1, 1).to(levels_NCHW.device, non_blocking=True).split(sizes)
    for operation, chosen, factor in zip(operations, rows_there, factors_there, strict=True):
        crops = levels_NCHW.index_select(0, chosen)
        if operation == BRIGHTNESS:
            crops.mul_(factor)
        elif operation == CONTRAST:
            _blend_(crops, _mean_luma(crops), factor)
        elif operation == SATURATION:
            _blend_(crops, _luma(crops), factor)
        else:
            crops = _turn_hue(crops, factor[:, 0])
        # Truncated, as Pillow does.
        levels_NCHW.index_copy_(0, chosen, crops.clamp_(0, 255).floor_())


def _luma(levels_NCHW: Tensor) -> Tensor:
    """Pillow's conversion to grey: [N, 1, H, W]."""
    red, green, blue = levels_NCHW.split(1, dim=1)
    weighted: Tensor = red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]
    return torch.floor(weighted.add_(2**15).mul_(2**-16))


def _mean_luma(levels_NCHW: Tensor) -> Tensor:
    """The rounded mean grey level of each crop: [N, 1, 1, 1]."""
    pixels = levels_NCHW.shape[2] * levels_NCHW.shape[3]
    # In float64: the sum over a whole crop leaves float32's exact integers.
    mean = _luma(levels_NCHW).sum((2, 3), keepdim=True, dtype=torch.float64).div_(pixels)
    return mean.add_(0.5).floor_().float()


def _blend_(levels: Tensor, centre: Tensor, factor: Tensor) -> None:
    levels.sub_(centre).mul_(factor).add_(centre)


def _turn_hue(levels_NCHW: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by whole steps of Pillow's 8-bit HSV, which wraps at 256; turn: [N, 1, 1]."""
    red, green, blue = levels_NCHW.unbind(1)
    value = levels_NCHW.amax(1)
    chroma = value - levels_NCHW.amin(1)
    divisor = chroma.clamp(min=1)
    # Pillow mixes single and double precision. The same mix is needed here: exact sixths and 255ths are truncated.
    to_red, to_green, to_blue = (((value - channel) / divisor).double() for channel in (red, green, blue))
    sixths = torch.where(
        red == value,
        to_blue - to_green,
        torch.where(green == value, to_red - to_blue + 2.0, to_green - to_red + 4.0),
    ).float()
    turns = (sixths.double() / 6.0 + 1.0).fmod_(1.0).float()
    hue = (turns.double() * 255.0).floor_().float()
    saturation = ((chroma / value.clamp(min=1)).double() * 255.0).floor_().float()

    hue = (hue + turn).remainder_(256.0)
    # Back, in whole 85ths of a sixth: a channel falls from value to value * (1 - saturation) and rises again.
    # Numerators stay below 2^24 and quotients never end in .5, so float32 rounds as Pillow's doubles do.
    channels = []
    for offset in (5 * 85.0, 3 * 85.0, 1 * 85.0):
        along = (2.0 * hue + offset).remainder_(6 * 85.0)
        fall = torch.minimum(along, 4 * 85.0 - along).clamp_(0.0, 85.0)
        channels.append((255.0 * 85.0 - saturation * fall).mul_(value).div_(255.0 * 85.0).add_(0.5).floor_())
    return torch.stack(channels, dim=1)


def _to_grey(levels_NCHW: Tensor, _: Tensor) -> Tensor:
    return _luma(levels_NCHW).expand_as(levels_NCHW)


def _solarise(levels_NCHW: Tensor, thresholds: Tensor) -> Tensor:
    there = thresholds.float().view(-1, 1, 1, 1).to(levels_NCHW.device, non_blocking=True)
    return torch.where(levels_NCHW >= there, 255.0 - levels_NCHW, levels_NCHW)


def _blur(levels_NCHW: Tensor, radius: Tensor) -> Tensor:
    """Pillow's Gaussian blur: along each axis three box blurs of fractional width, rounded to 8 bits after each."""
    weights_RN = box_weights(radius.double())
    weights = weights_RN.float().view(-1, len(radius), 1, 1, 1).to(levels_NCHW.device, non_blocking=True).unbind()
    for axis in (3, 2):
        for _ in range(BLUR_PASSES):
            levels_NCHW = _box_blur(levels_NCHW, weights, axis)
    return levels_NCHW


def box_weights(radius: Tensor) -> Tensor:
    """Weights of a box blur's pixels by their distance from the centre: [N] float64 to [R + 1, N].

    Three such boxes have the variance of a Gaussian of this radius (Gwosdek et al. 2011, extended box filters).
    """
    variance = radius**2 / BLUR_PASSES
    whole = ((torch.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0).floor()
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    inner = 1.0 / (2.0 * (whole + edge) + 1.0)
    outer = (1.0 - (2.0 * whole + 1.0) * inner) / 2.0
    distance = torch.arange(int(whole.max()) + 2)[:, None]
    return torch.where(distance <= whole, inner, torch.where(distance == whole + 1, outer, 0.0))


def _box_blur(levels_NCHW: Tensor, weights: tuple[Tensor, ...], axis: int) -> Tensor:
    """One pass along one axis, the border's pixels repeated outwards; weights: by distance, [N, 1, 1, 1] each."""
    reach, length = len(weights) - 1, levels_NCHW.shape[axis]
    margins = (reach, reach, 0, 0) if axis == 3 else (0, 0, reach, reach)
    padded = F.pad(levels_NCHW, margins, mode="replicate")
    blurred = levels_NCHW * weights[0]
    for distance in range(1, reach + 1):
        before = padded.narrow(axis, reach - distance, length)
        after = padded.narrow(axis, reach + distance, length)
        blurred.addcmul_(before + after, weights[distance])
    return blurred.add_(0.5).floor_()
