"""Batches without pixels and words, for counts: shapes, dtypes and the captions' lengths are those of training."""

import torch
from torch import Tensor

from cosmos_scale.batch import Batch
from cosmos_scale.config import RunConfig

GLOBAL_TOKENS, LOCAL_TOKENS = (20, 75), (8, 28)
"""The fewest and the most tokens of a global and of a local caption, both ends included; long generated captions."""


def planned_lengths(config: RunConfig, samples: int) -> Tensor:
    """Return the tokens of each caption: [K, B] int64 on the CPU; the same for the same numbers."""
    captions, context = config.data.captions, config.model.text.context_length
    bounds = [GLOBAL_TOKENS] * captions.global_count + [LOCAL_TOKENS] * (captions.count - captions.global_count)
    generator = torch.Generator().manual_seed(0)
    return torch.cat(
        [torch.randint(least, most + 1, (1, samples), generator=generator) for least, most in bounds]
    ).clamp(max=context)


def planned_batch(config: RunConfig, lengths_KB: Tensor, device: torch.device) -> Batch:
    """Return a rank's batch without values: crops and ids on a device, the captions' lengths on the CPU.

    lengths: [K, B] int64 on the CPU.
    """
    views, model = config.data.views, config.model
    captions, samples = lengths_KB.shape

    def crops(count: int, side: int) -> Tensor:
        return torch.empty(count, samples, 3, side, side, dtype=torch.uint8, device=device)

    return Batch(
        crops(views.global_crops, model.vision.image_size),
        crops(views.local_crops, views.local_size),
        torch.zeros(captions, samples, model.text.context_length, dtype=torch.int32, device=device),
        lengths_KB,
        torch.arange(samples),
        torch.tensor(0),
    )
