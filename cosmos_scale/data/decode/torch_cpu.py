"""The CPU decoder: executes view plans with simplejpeg, torch's antialiased bicubic and OpenCV's 8-bit colour."""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cosmos_scale.batch import MEAN, STD
from cosmos_scale.data.decode import colour
from cosmos_scale.data.decode.background import KEEP
from cosmos_scale.data.decode.picture import Pixels, decode_rgbx
from cosmos_scale.data.samples.view_plan import NO_JITTER, NO_SOLARISE, ViewPlan
from cosmos_scale.phases import phase

# For each channel, the normalised value of each of the 256 levels.
TABLES = [
    ((np.arange(256) / 255 - mean) / std).astype(np.float32).reshape(256, 1)
    for mean, std in zip(MEAN, STD, strict=True)
]


def execute(picture: Pixels, plan: ViewPlan, global_crops: Tensor, local_crops: Tensor) -> None:
    """Make all planned views of a decoded [H, W, 4] picture.

    global_crops: [V_global, 3, H, W], local_crops: [V_local, 3, h, w], uint8, each view contiguous, so that they may be
    slices of a batch; they are overwritten.
    """
    for view, out in enumerate([*global_crops, *local_crops]):
        pixels = execute_view(picture, plan, view)
        with phase("crops"):
            split_channels(pixels, out)


def execute_view(picture: Pixels, plan: ViewPlan, view: int) -> Pixels:
    """Make one view of a decoded [H, W, 4] picture: [side, side, 3] uint8."""
    with phase("crops"):
        pixels = crop(picture, plan, view)
    with phase("colour"):
        pixels = recolour(pixels, plan, view)
    with phase("blur"):
        return blur_and_solarise(pixels, plan, view)


def evaluation_image(image_bytes: bytes, image_size: int, max_pixels: int, background: str = KEEP) -> Tensor:
    """Resize the shortest side to `image_size` (bicubic, antialiased), crop the centre, normalise: [3, H, W] float32.

    Raises DamagedSample where the picture does not decode.
    """
    return evaluation_crop(decode_rgbx(image_bytes, max_pixels, background), image_size)


def evaluation_crop(picture: Pixels, image_size: int) -> Tensor:
    """Do what `evaluation_image` does with a decoded [H, W, 4] picture: [3, image_size, image_size] float32.

    Pillow resizes, as in the published evaluation: torch's result is up to five grey levels from Pillow's.
    """
    height, width = picture.shape[:2]
    shortest = min(height, width)
    size = (image_size * width // shortest, image_size * height // shortest)
    resized = np.asarray(Image.fromarray(colour.rgb(picture)).resize(size, Image.Resampling.BICUBIC))
    # Python rounds the margin as torchvision's CenterCrop does.
    top, left = (round((side - image_size) / 2) for side in resized.shape[:2])
    centre = resized[top : top + image_size, left : left + image_size]
    image = torch.empty(3, image_size, image_size)
    for plane, levels, table in zip(image.numpy(), cv2.split(centre), TABLES, strict=True):
        cv2.LUT(levels, table, dst=plane)
    return image


def crop(picture: Pixels, plan: ViewPlan, view: int) -> Pixels:
    """Cut out a view's box, resize and flip it: [side, side, 3]."""
    top, left, height, width = plan.boxes[view]
    side = int(plan.sides[view])
    pixels = colour.rgb(_resize(picture[top : top + height, left : left + width], side, side))
    return colour.mirror(pixels) if plan.flip[view] else pixels


def recolour(pixels: Pixels, plan: ViewPlan, view: int) -> Pixels:
    """Jitter the colours of a [side, side, 3] view, and make grey views grey."""
    for operation in plan.jitter_order[view].tolist():
        factor = float(plan.jitter_factors[view, operation])
        if factor != NO_JITTER[operation]:
            pixels = colour.jitter(pixels, operation, factor)
    return colour.grey(pixels) if plan.grey[view] else pixels


def blur_and_solarise(pixels: Pixels, plan: ViewPlan, view: int) -> Pixels:
    """Blur and solarise a [side, side, 3] view, the last of a view's operations."""
    if plan.blur_radius[view] > 0:
        pixels = colour.blur(pixels, float(plan.blur_radius[view]))
    if plan.solarise[view] < NO_SOLARISE:
        pixels = colour.solarise(pixels, int(plan.solarise[view]))
    return pixels


def split_channels(pixels: Pixels, out: Tensor) -> None:
    """Write [H, W, 3] uint8 into `out` [3, H, W] uint8, contiguous: the channels one after the other."""
    if out.dtype != torch.uint8 or not out.is_contiguous() or out.shape[1:] != pixels.shape[:2]:
        # OpenCV would write to new arrays instead of `out`.
        raise ValueError(f"{tuple(out.shape)} {out.dtype} cannot take a view of {pixels.shape[:2]}: see split_channels")
    cv2.split(pixels, list(out.numpy()))


def _resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """Resize [h, w, 4] bicubically with antialiasing; channels stay last in memory, which torch's fast path needs."""
    # The batch dimension is added before the permutation. Added after, its stride would hide the order from torch.
    source = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    resized = F.interpolate(source, (height, width), mode="bicubic", antialias=True)
    result: Pixels = resized[0].permute(1, 2, 0).numpy()
    return result
