"""Batches of noise, for tests, benchmarks and tools that need no pictures."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cosmos_scale.batch import MEAN, STD, Batch
from cosmos_scale.config import ModelConfig, ViewsConfig


def random_batch(
    model: ModelConfig, views: ViewsConfig, samples: int, lengths: Sequence[tuple[int, int]], *, seed: int = 0
) -> Batch:
    """Return a batch of noise, which a seed determines: crops, and captions with the EOT, the largest id, at their end.

    Crops are float32, normalised. lengths: for each caption of a sample, the fewest and the most tokens, the EOT
    included. Other ids are from 1 up.
    """
    generator = torch.Generator().manual_seed(seed)
    eot = model.text.vocab_size - 1
    shape = (len(lengths), samples, model.text.context_length)
    ids_KBL = torch.randint(1, eot, shape, generator=generator, dtype=torch.int32)
    lengths_KB = torch.cat(
        [torch.randint(least, most + 1, (1, samples), generator=generator) for least, most in lengths]
    )
    places_L = torch.arange(model.text.context_length)
    ids_KBL[places_L == lengths_KB[..., None] - 1] = eot
    ids_KBL[places_L >= lengths_KB[..., None]] = 0

    def crops(count: int, side: int) -> Tensor:
        return torch.randn(count, samples, 3, side, side, generator=generator)

    return Batch(
        crops(views.global_crops, model.vision.image_size),
        crops(views.local_crops, views.local_size),
        ids_KBL,
        lengths_KB,
        torch.arange(samples),
        torch.tensor(0),
    )


def with_levels(batch: Batch) -> Batch:
    """Return a batch whose normalised crops are rounded to levels of 8-bit pixels, as a loader makes them."""
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))

    def levels(crops: Tensor) -> Tensor:
        return ((crops * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    return batch._replace(global_crops=levels(batch.global_crops), local_crops=levels(batch.local_crops))
