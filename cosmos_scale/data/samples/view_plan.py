"""What happens to each view of one image, decided before a pixel is touched: the plan that every decoder executes.

All randomness is counter-based (Philox), so a plan is a pure function of its key, the config and the picture's size:
no worker, rank, restart or other sample can change the plan. Each view has its own row of uniform numbers, and each
decision its own column of the row. So a changed probability, or another number of views, leaves all other decisions as
they were.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cosmos_scale.config import BlurConfig, JitterConfig, ViewsConfig
from cosmos_scale.data.samples.sample import VIEW_STREAM, SampleKey, sample_generator

# Positions in ViewPlan.jitter_factors, and the values in ViewPlan.jitter_order.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NO_JITTER = (1.0, 1.0, 1.0, 0.0)
NO_SOLARISE = 256

# Columns of a view's row of uniform numbers.
AREA = slice(0, 10)
RATIO = slice(10, 20)
TOP, LEFT, FLIP, JITTER = 20, 21, 22, 23
JITTER_ORDER = slice(24, 28)
JITTER_FACTORS = slice(28, 32)
GREY, BLUR, BLUR_RADIUS, SOLARISE = 32, 33, 34, 35
DRAWS_PER_VIEW = 36

Floats = npt.NDArray[np.float64]
WholeNumbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class ViewPlan:
    """The operations on every view, global crops first, to be executed in the order of these fields on 8-bit pixels.

    boxes: [V, 4] int64: top, left, height, width in pixels of the decoded picture.
    sides: [V] int64: each box is resized (bicubic, antialiased) to a square of this side.
    flip: [V] bool: mirror left and right.
    jitter_order: [V, 4] int64: a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE, first operation first.
    jitter_factors: [V, 4] float64, in the fixed order of those constants; an operation with the neutral factor
        (1 for the first three, 0 turns for hue) is left out.
    grey: [V] bool.
    blur_radius: [V] float64, standard deviation in pixels; 0: no blur.
    solarise: [V] int64: values from this threshold on are inverted; 256: none.
    """

    boxes: WholeNumbers
    sides: WholeNumbers
    flip: Flags
    jitter_order: WholeNumbers
    jitter_factors: Floats
    grey: Flags
    blur_radius: Floats
    solarise: WholeNumbers


def plan_views(views: ViewsConfig, image_size: int, key: SampleKey, height: int, width: int) -> ViewPlan:
    """Plan all views of a picture of `height` x `width` pixels; `image_size` is the side of the global crops.

    Laws: torchvision's RandomResizedCrop and ColorJitter, DINO's blur and solarisation (Caron et al. 2021, section 3).
    """
    V = views.global_crops + views.local_crops
    draws = sample_generator(key, VIEW_STREAM).random((V, DRAWS_PER_VIEW)).tolist()
    # Plain floats: arrays are slower for so few views.
    rows = [_plan_view(views, image_size, view, row, height, width) for view, row in enumerate(draws)]
    boxes, sides, flip, jitter_order, jitter_factors, grey, blur_radius, solarise = zip(*rows, strict=True)
    return ViewPlan(
        boxes=np.array(boxes, dtype=np.int64),
        sides=np.array(sides, dtype=np.int64),
        flip=np.array(flip),
        jitter_order=np.array(jitter_order, dtype=np.int64),
        jitter_factors=np.array(jitter_factors),
        grey=np.array(grey),
        blur_radius=np.array(blur_radius),
        solarise=np.array(solarise, dtype=np.int64),
    )


def _plan_view(
    views: ViewsConfig, image_size: int, view: int, draws: list[float], height: int, width: int
) -> tuple[Any, ...]:
    """Plan one view from its row of uniform numbers: the fields of ViewPlan, in their order."""
    is_global = view < views.global_crops
    blurred = draws[BLUR] < _blur_probability(views.blur, view, is_global)
    solarised = is_global and view == 1 and draws[SOLARISE] < views.solarise
    return (
        _box(draws, views.global_scale if is_global else views.local_scale, views.ratio, height, width),
        image_size if is_global else views.local_size,
        draws[FLIP] < views.flip,
        sorted(range(4), key=draws[JITTER_ORDER].__getitem__),
        _jitter_factors(draws, views.jitter),
        draws[GREY] < views.grey,
        _within(draws[BLUR_RADIUS], *views.blur.radius) if blurred else 0.0,
        views.solarise_threshold if solarised else NO_SOLARISE,
    )


def _within(uniform: float, low: float, high: float) -> float:
    return low + (high - low) * uniform


def _box(draws: list[float], scale: tuple[float, float], ratio: tuple[float, float], height: int, width: int) -> Box:
    """One view's first box of ten tries that fits."""
    for area_draw, ratio_draw in zip(draws[AREA], draws[RATIO], strict=True):
        area = _within(area_draw, *scale) * (height * width)
        w_over_h = math.exp(_within(ratio_draw, math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * w_over_h)), round(math.sqrt(area / w_over_h))
        if 0 < w <= width and 0 < h <= height:
            # floor(u * n) < n also after rounding: u is at most 1 - 2^-53 and n far below 2^53.
            return int(draws[TOP] * (height - h + 1)), int(draws[LEFT] * (width - w + 1)), h, w
    return _centre_box(ratio, height, width)


def _centre_box(ratio: tuple[float, float], height: int, width: int) -> Box:
    """The largest centred box, its ratio clamped, for a picture so long that no try fitted; a pixel at least."""
    h, w = height, width
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def _jitter_factors(draws: list[float], jitter: JitterConfig) -> tuple[float, ...]:
    """Brightness, contrast and saturation factors and the hue shift in turns, neutral where not jittered."""
    if draws[JITTER] >= jitter.probability:
        return NO_JITTER
    spreads = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    return tuple(
        _within(uniform, neutral - spread, neutral + spread)
        for uniform, neutral, spread in zip(draws[JITTER_FACTORS], NO_JITTER, spreads, strict=True)
    )


def _blur_probability(blur: BlurConfig, view: int, is_global: bool) -> float:
    if not is_global:
        return blur.local
    return blur.other_globals if view > 0 else blur.first_global
