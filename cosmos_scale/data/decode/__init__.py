"""Decoders: pure executors of a view plan, one file a library."""

from typing import NamedTuple

import torch
from torch import Tensor

from cosmos_scale.config import ViewsConfig

# CLIP's statistics of RGB values in 0..1 (Radford et al. 2021, released code).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Views(NamedTuple):
    """All views of one picture, normalised by MEAN and STD.

    global_crops: [V_global, 3, H, W] float32. local_crops: [V_local, 3, h, w] float32; V_local may be 0.
    """

    global_crops: Tensor
    local_crops: Tensor

    @classmethod
    def empty(cls, views: ViewsConfig, image_size: int) -> "Views":
        """Allocate the views of one picture, without values; image_size is the side of the global crops."""
        return cls(
            torch.empty(views.global_crops, 3, image_size, image_size),
            torch.empty(views.local_crops, 3, views.local_size, views.local_size),
        )
