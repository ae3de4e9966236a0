"""Decoders: pure executors of a view plan, one file a library."""

from typing import NamedTuple

import torch
from torch import Tensor

from cosmos_scale.config import ViewsConfig


class Views(NamedTuple):
    """All views of one picture, as levels of 8-bit pixels.

    global_crops: [V_global, 3, H, W] uint8. local_crops: [V_local, 3, h, w] uint8; V_local may be 0.
    """

    global_crops: Tensor
    local_crops: Tensor

    @classmethod
    def empty(cls, views: ViewsConfig, image_size: int) -> "Views":
        """Allocate the views of one picture, without values; image_size is the side of the global crops."""
        return cls(
            torch.empty(views.global_crops, 3, image_size, image_size, dtype=torch.uint8),
            torch.empty(views.local_crops, 3, views.local_size, views.local_size, dtype=torch.uint8),
        )
