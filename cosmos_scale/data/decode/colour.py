"""Colour and blur of 8-bit RGB pictures, as Pillow and torchvision define them, in OpenCV's vector instructions.

Pillow truncates where OpenCV rounds; a shift by almost half a level makes them agree. Three differences remain: hues
are rounded and not truncated, a blur rounds once and not six times, and the grey of contrast and saturation is not
rounded on the way. Together they are 0.1 to 0.5 grey levels on average.
"""

import math
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from cosmos_scale.data.decode.picture import Pixels
from cosmos_scale.data.samples.view_plan import BRIGHTNESS, CONTRAST, HUE, SATURATION

cv2.setNumThreads(0)  # a loader has as many processes as it may use cores

GREY = (0.299, 0.587, 0.114)  # ITU-R 601, Pillow's "L"
# Slightly less than a half, so that whole numbers do not change.
TRUNCATE = -0.4999
# Saturation is affine in its factor: [3, 4] matrices of the value at factor 0, and of what each unit of factor adds.
UNSATURATED = np.column_stack([np.tile(GREY, (3, 1)), np.full(3, TRUNCATE)])
SATURATED = np.column_stack([np.eye(3) - GREY, np.zeros(3)])
KERNEL_UNIT = 256  # OpenCV filters 8-bit pictures with multiples of 1/256
RADIUS_DIGITS = 2  # finer radii do not change kernels of such steps

Kernel = npt.NDArray[np.float32]


def rgb(pixels: Pixels) -> Pixels:
    """[H, W, 4] without its last channel."""
    return _pixels(cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB))


def mirror(pixels: Pixels) -> Pixels:
    """Left becomes right."""
    return _pixels(cv2.flip(pixels, 1))


def jitter(pixels: Pixels, operation: int, factor: float) -> Pixels:
    """One operation of torchvision's ColorJitter on [H, W, 3]; hue in turns, through 8-bit HSV."""
    if operation == BRIGHTNESS:
        return _pixels(cv2.convertScaleAbs(pixels, alpha=factor, beta=TRUNCATE))
    if operation == CONTRAST:
        red, green, blue, _ = cv2.mean(pixels)
        mean = int(GREY[0] * red + GREY[1] * green + GREY[2] * blue + 0.5)
        return _pixels(cv2.addWeighted(pixels, factor, pixels, 0.0, (1 - factor) * mean + TRUNCATE))
    if operation == SATURATION:
        return _pixels(cv2.transform(pixels, UNSATURATED + factor * SATURATED))
    assert operation == HUE
    return _turn_hue(pixels, int(factor * 255))


def grey(pixels: Pixels) -> Pixels:
    """The brightness of [H, W, 3], in all three channels."""
    return _pixels(cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB))


def blur(pixels: Pixels, radius: float) -> Pixels:
    """Pillow's GaussianBlur of [H, W, 3]; radius: standard deviation in pixels, above 0."""
    kernel = blur_kernel(round(radius, RADIUS_DIGITS))
    if len(kernel) == 1:
        return pixels
    return _pixels(cv2.sepFilter2D(pixels, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE))


def solarise(pixels: Pixels, threshold: int) -> Pixels:
    """Invert the values of [H, W, 3] from a threshold on."""
    levels = np.arange(256)
    return _pixels(cv2.LUT(pixels, np.where(levels < threshold, levels, 255 - levels).astype(np.uint8)))


@lru_cache(maxsize=1024)
def blur_kernel(radius: float) -> Kernel:
    """The one-dimensional kernel that Pillow's three box blurs of fractional width amount to, in steps of 1/256.

    Widths: Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering", eq. 14.
    """
    variance = radius * radius / 3  # of each of the three box blurs
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.array([edge, *[1.0] * (2 * whole + 1), edge])
    box /= box.sum()
    kernel = np.rint(np.convolve(np.convolve(box, box), box) * KERNEL_UNIT)
    middle = len(kernel) // 2
    kernel[middle] += KERNEL_UNIT - kernel.sum()  # with another sum the picture would become darker or brighter
    reach = np.flatnonzero(kernel)
    result: Kernel = (kernel[reach[0] : reach[-1] + 1] / KERNEL_UNIT).astype(np.float32)
    return result


def _turn_hue(pixels: Pixels, shift: int) -> Pixels:
    """Turn the hues of [H, W, 3] by `shift` 255ths.

    OpenCV's conversion from HSV is not used: it takes whole hues only, which cannot express Pillow's truncated hues.
    A pixel of value V and chroma C is V - C * w in each channel, with the weights w a function of hue alone.
    """
    hue, saturation, value = cv2.split(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL))
    chroma = cv2.cvtColor(cv2.multiply(saturation, value, scale=1 / 255), cv2.COLOR_GRAY2RGB)
    weights = cv2.applyColorMap(hue, _hue_weights(shift))
    return _pixels(cv2.subtract(cv2.cvtColor(value, cv2.COLOR_GRAY2RGB), cv2.multiply(chroma, weights, scale=1 / 255)))


@lru_cache(maxsize=512)
def _hue_weights(shift: int) -> Pixels:
    """How far below the largest channel each channel lies, in 255ths of the chroma: [256 hues of OpenCV, 1, 3]."""
    # Pillow truncates hue to 255ths of a turn, by half a 255th on average; torchvision adds modulo 256.
    hue = np.arange(256) * (255 / 256) - 0.5
    sixths = (hue + shift) % 256 * (6 / 255)
    below = [np.minimum((sixths + channel) % 6, 4 - (sixths + channel) % 6) for channel in (5, 3, 1)]
    weights: Pixels = np.rint(255 * np.clip(np.stack(below, axis=-1), 0, 1)).astype(np.uint8)[:, None]
    return weights


def _pixels(result: object) -> Pixels:
    assert isinstance(result, np.ndarray)
    return result
