"""What happens to each view of one image, decided before a pixel is touched: the plan that every decoder executes.

All randomness is counter-based (Philox), so a plan is a pure function of its key, the config and the picture's size:
no worker, rank, restart or other sample can change it. Each view owns one row of uniform numbers and each decision one
column of it, so that a changed probability, or another number of views, leaves all other decisions as they were.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cosmos_scale.config_data import BlurConfig, JitterConfig, ViewsConfig
from cosmos_scale.data.sample import SampleKey

VIEW_STREAM = 0
CAPTION_STREAM = 1

# Positions in ViewPlan.jitter_factors, and the values in ViewPlan.jitter_order.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NO_JITTER = (1.0, 1.0, 1.0, 0.0)
NO_SOLARISE = 256

CROP_TRIES = 10

# Columns of a view's row of uniform numbers.
AREA = slice(0, 10)
RATIO = slice(10, 20)
TOP, LEFT, FLIP, JITTER = 20, 21, 22, 23
JITTER_ORDER = slice(24, 28)
JITTER_FACTORS = slice(28, 32)
GREY, BLUR, BLUR_RADIUS, SOLARISE = 32, 33, 34, 35
DRAWS_PER_VIEW = 36

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


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

    boxes: Integers
    sides: Integers
    flip: Flags
    jitter_order: Integers
    jitter_factors: Floats
    grey: Flags
    blur_radius: Floats
    solarise: Integers


def sample_generator(key: SampleKey, stream: int) -> np.random.Generator:
    """Open one random stream of one sample; call only its `.random()`.

    Philox-4x64 takes (seed, epoch) as its key; (repeat, sample, stream) are the high words of its counter, so streams
    never overlap (they lie 2^64 blocks apart). Form every other distribution from uniform doubles by plain arithmetic:
    NumPy does not promise that its own distributions stay the same from version to version.
    """
    # Arrays, not lists: NumPy reads a list that mixes integers below and above 2^63 as floats.
    key_words = np.array([key.seed, key.epoch], dtype=np.uint64)
    counter = np.array([0, key.repeat, key.sample, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key_words, counter=counter))


def plan_views(views: ViewsConfig, image_size: int, key: SampleKey, height: int, width: int) -> ViewPlan:
    """Plan all views of a picture of `height` x `width` pixels; `image_size` is the side of the global crops.

    Laws: torchvision's RandomResizedCrop and ColorJitter, DINO's blur and solarisation (Caron et al. 2021, section 3).
    """
    V_global, V = views.global_crops, views.global_crops + views.local_crops
    is_global = np.arange(V) < V_global
    draws = sample_generator(key, VIEW_STREAM).random((V, DRAWS_PER_VIEW))

    scale = np.where(is_global[:, None], views.global_scale, views.local_scale)
    solarised = (np.arange(V) == 1) & is_global & (draws[:, SOLARISE] < views.solarise)
    blurred = draws[:, BLUR] < _blur_probabilities(views.blur, V_global, V)
    return ViewPlan(
        boxes=_boxes(draws, scale, views.ratio, height, width),
        sides=np.where(is_global, image_size, views.local_size).astype(np.int64),
        flip=draws[:, FLIP] < views.flip,
        jitter_order=np.argsort(draws[:, JITTER_ORDER], axis=1, kind="stable"),
        jitter_factors=_jitter_factors(draws, views.jitter),
        grey=draws[:, GREY] < views.grey,
        blur_radius=np.where(blurred, _within(draws[:, BLUR_RADIUS], *views.blur.radius), 0.0),
        solarise=np.where(solarised, views.solarise_threshold, NO_SOLARISE).astype(np.int64),
    )


def _within(uniform: Floats, low: Any, high: Any) -> Floats:
    result: Floats = low + (high - low) * uniform
    return result


def _boxes(draws: Floats, scale: Floats, ratio: tuple[float, float], height: int, width: int) -> Integers:
    """Each view's first box of ten tries that fits; [V, 4]."""
    area_VT = _within(draws[:, AREA], scale[:, :1], scale[:, 1:]) * (height * width)
    ratio_VT = np.exp(_within(draws[:, RATIO], np.log(ratio[0]), np.log(ratio[1])))
    w_VT = np.rint(np.sqrt(area_VT * ratio_VT)).astype(np.int64)
    h_VT = np.rint(np.sqrt(area_VT / ratio_VT)).astype(np.int64)
    fits_VT = (w_VT > 0) & (w_VT <= width) & (h_VT > 0) & (h_VT <= height)

    rows = np.arange(len(draws))
    first = fits_VT.argmax(axis=1)
    h, w = h_VT[rows, first], w_VT[rows, first]
    # floor(u * n) < n also after rounding: u is at most 1 - 2^-53 and n far below 2^53.
    top = np.floor(draws[:, TOP] * (height - h + 1)).astype(np.int64)
    left = np.floor(draws[:, LEFT] * (width - w + 1)).astype(np.int64)
    boxes = np.stack([top, left, h, w], axis=1)
    boxes[~fits_VT.any(axis=1)] = _centre_box(ratio, height, width)
    return boxes


def _centre_box(ratio: tuple[float, float], height: int, width: int) -> tuple[int, int, int, int]:
    """The largest centred box, its ratio clamped, for a picture so long that no try fitted."""
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def _jitter_factors(draws: Floats, jitter: JitterConfig) -> Floats:
    """Brightness, contrast and saturation factors and the hue shift in turns, neutral where not jittered; [V, 4]."""
    spread = np.array([jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue])
    factors = _within(draws[:, JITTER_FACTORS], NO_JITTER - spread, NO_JITTER + spread)
    jittered = draws[:, JITTER] < jitter.probability
    return np.where(jittered[:, None], factors, NO_JITTER)


def _blur_probabilities(blur: BlurConfig, V_global: int, V: int) -> Floats:
    first, others, local = [blur.first_global], [blur.other_globals] * (V_global - 1), [blur.local] * (V - V_global)
    return np.array(first + others + local)
