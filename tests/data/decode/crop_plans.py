"""Plans and pixels of the crops of several views, as the DALI decoder hands them to colour."""

import numpy as np
import torch
from torch import Tensor

from cosmos_scale.config import ViewsConfig
from cosmos_scale.data.samples.sample import SampleKey
from cosmos_scale.data.samples.view_plan import plan_views

FIELDS = ("jitter_order", "jitter_factors", "grey", "blur_radius", "solarise")


def plan_fields(views: ViewsConfig, samples: int) -> dict[str, Tensor]:
    """The fields of the global crops' plans: view by view, then sample by sample."""
    plans = [plan_views(views, 32, SampleKey(3, 0, sample), 64, 64) for sample in range(samples)]
    stacked = {name: np.stack([getattr(plan, name)[: views.global_crops] for plan in plans], axis=1) for name in FIELDS}
    return {name: torch.from_numpy(field).flatten(0, 1) for name, field in stacked.items()}


def some_pixels(views: int, samples: int, height: int, width: int) -> list[Tensor]:
    """Pixels for each view, [samples, height, width, 3] uint8: noise, with planes of one colour in it."""
    generator = torch.Generator().manual_seed(0)
    shape = (views, samples, height, width, 3)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    pixels[:, 0] = torch.tensor([0, 0, 0], dtype=torch.uint8)
    pixels[:, 1] = torch.tensor([255, 128, 0], dtype=torch.uint8)
    return list(pixels)
