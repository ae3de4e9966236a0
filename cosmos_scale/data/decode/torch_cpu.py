"""The CPU decoder: executes view plans with simplejpeg, torch's antialiased bicubic and Pillow's 8-bit colour.

Pillow is the published pipeline's own library, so colour is exact to the bit; crops differ from its resize by rounding.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from cosmos_scale.data.decode import MEAN, STD
from cosmos_scale.data.decode.picture import Pixels, decode_rgbx
from cosmos_scale.data.plan import BRIGHTNESS, CONTRAST, HUE, NO_JITTER, NO_SOLARISE, SATURATION, ViewPlan

LEVELS = np.arange(256, dtype=np.float32)
SCALE = torch.tensor([1.0 / (255.0 * std) for std in STD]).view(3, 1, 1)
SHIFT = torch.tensor([-mean / std for mean, std in zip(MEAN, STD, strict=True)]).view(3, 1, 1)


def execute(picture: Pixels, plan: ViewPlan, global_crops: Tensor, local_crops: Tensor) -> None:
    """Make all planned views of a decoded [H, W, 4] picture.

    global_crops: [V_global, 3, H, W], local_crops: [V_local, 3, h, w], float32; they are overwritten, normalised. They
    may be slices of a batch.
    """
    for view, out in enumerate([*global_crops, *local_crops]):
        _normalise(execute_view(picture, plan, view), out)


def evaluation_image(image_bytes: bytes, image_size: int, max_pixels: int) -> Tensor:
    """Resize the shortest side to `image_size` (bicubic, antialiased), crop the centre, normalise: [3, H, W] float32.

    Raises DamagedSample.
    """
    picture = decode_rgbx(image_bytes, max_pixels)
    height, width = picture.shape[:2]
    shortest = min(height, width)
    resized = _resize(picture, image_size * height // shortest, image_size * width // shortest)
    # Python's rounding of the margin, as torchvision's CenterCrop.
    top, left = (round((side - image_size) / 2) for side in resized.shape[:2])
    centre = resized[top : top + image_size, left : left + image_size, :3]
    return _normalise(centre, torch.empty(3, image_size, image_size))


def execute_view(picture: Pixels, plan: ViewPlan, view: int) -> Pixels:
    """Make one view of a decoded [H, W, 4] picture: [side, side, 3] uint8, before normalisation."""
    top, left, height, width = plan.boxes[view]
    side = int(plan.sides[view])
    crop = _resize(picture[top : top + height, left : left + width], side, side)
    if plan.flip[view]:
        crop = crop[:, ::-1]
    image = Image.frombytes("RGB", (side, side), crop.tobytes(), "raw", "RGBX")
    for operation in plan.jitter_order[view]:
        factor = float(plan.jitter_factors[view, operation])
        if factor != NO_JITTER[operation]:
            image = _jitter(image, int(operation), factor)
    if plan.grey[view]:
        image = image.convert("L").convert("RGB")
    if plan.blur_radius[view] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(plan.blur_radius[view])))
    if plan.solarise[view] < NO_SOLARISE:
        inverted = plan.solarise[view] <= LEVELS
        image = _map_levels(image, np.where(inverted, 255 - LEVELS, LEVELS))
    return np.asarray(image)


def _resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """Resize [h, w, 4] bicubically with antialiasing; channels stay last in memory, which torch's fast path needs."""
    source = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    resized = F.interpolate(source, (height, width), mode="bicubic", antialias=True)
    result: Pixels = resized[0].permute(1, 2, 0).numpy()
    return result


def _jitter(image: Image.Image, operation: int, factor: float) -> Image.Image:
    """One operation of colour jitter as torchvision does it on 8-bit pictures (truncating, hue in 8-bit HSV)."""
    if operation == BRIGHTNESS:
        return _map_levels(image, np.float32(factor) * LEVELS)
    if operation == CONTRAST:
        histogram = image.convert("L").histogram()
        mean = np.float32(int(np.dot(histogram, LEVELS.astype(np.float64)) / sum(histogram) + 0.5))
        return _map_levels(image, mean + np.float32(factor) * (LEVELS - mean))
    if operation == SATURATION:
        return Image.blend(image.convert("L").convert("RGB"), image, factor)
    assert operation == HUE
    # Towards zero, then modulo 256: what torchvision's cast to 8 bits does.
    turned = (np.arange(256) + int(factor * 255)) % 256
    same = np.arange(256)
    return image.convert("HSV").point(np.concatenate([turned, same, same]).tolist()).convert("RGB")


def _map_levels(image: Image.Image, levels: np.ndarray[tuple[int], np.dtype[np.float32]]) -> Image.Image:
    """Replace each of the 256 levels, in all channels, by the truncated and clipped value given for it."""
    return image.point(np.clip(levels, 0, 255).astype(np.uint8).tolist() * 3)


def _normalise(pixels: Pixels, out: Tensor) -> Tensor:
    """Write [H, W, 3] uint8 into `out` [3, H, W] float32, normalised."""
    # A copy: torch wants neither read-only memory (Pillow's) nor negative strides.
    planes = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    return torch.mul(planes, SCALE, out=out).add_(SHIFT)
