"""A picture's bytes to what the image tower sees of it: upright, resized, normalised."""

import io
from collections.abc import Callable

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cosmos_scale.data.decode.background import KEEP
from cosmos_scale.data.decode.picture import Pixels, decode_rgbx
from cosmos_scale.data.samples.sample import DamagedSample

LONGEST = 2048  # pixels of the longer side, at most
_ORIENTATION = 0x0112  # EXIF's tag
# Of 8-bit levels. The published evaluation rounds CLIP's mean and deviation so, which changes logits.
_MEAN, _STD = (122.771, 116.746, 104.094), (68.501, 66.632, 70.323)
# What turns a picture upright, by EXIF's orientation (CIPA DC-008, 4.6.4): of rows, columns, channels.
_TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels[::-1].transpose(1, 0, 2),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: pixels[:, ::-1].transpose(1, 0, 2),
}


def decode_upright(image_bytes: bytes, max_pixels: int, background: str = KEEP) -> Pixels:
    """Decode a picture to [H, W, 3] uint8 RGB, turned as its EXIF orientation says, as OpenCV does.

    max_pixels, background: as in `decode_rgbx`. Raises DamagedSample.
    """
    pixels = decode_rgbx(image_bytes, max_pixels, background)[..., :3]
    try:
        orientation = Image.open(io.BytesIO(image_bytes)).getexif().get(_ORIENTATION)
    except Exception:  # of any type: EXIF that cannot be read turns nothing
        orientation = None
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return np.ascontiguousarray(pixels if turn is None else turn(pixels))


def resize_for_windows(pixels: Pixels, short_side: int, longest: int = LONGEST) -> Pixels:
    """Resize [H, W, 3] so that the shorter side becomes `short_side`, and the longer one `longest` at most.

    Bilinear in 8 bits, without antialiasing: OpenCV's INTER_LINEAR, whose levels the published evaluation sees. Smaller
    pictures are enlarged.
    """
    height, width = pixels.shape[:2]
    factor = min(longest / max(height, width), short_side / min(height, width))
    size = int(width * factor + 0.5), int(height * factor + 0.5)
    if not all(size):
        raise DamagedSample(f"the picture has {width} x {height} pixels, too narrow to be resized")
    resized: Pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)
    return resized


def normalise_levels(pixels: Pixels) -> Tensor:
    """Return the normalised picture [3, H, W] float32 of levels [H, W, 3]."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return torch.from_numpy(pixels).permute(2, 0, 1).float().sub_(mean).div_(deviation).contiguous()
