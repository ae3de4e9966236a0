"""Small models and batches for the tests of the model."""

from collections.abc import Sequence

import numpy as np
import torch

from cosmos_scale.batch import Batch
from cosmos_scale.config import ModelConfig, TextConfig, ViewsConfig, VisionConfig
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.testing.batches import random_batch

# Every size differs from every other where it may, so that one taken for another shows.
SMALL = ModelConfig(
    embed_dim=32,
    pooler_heads=4,
    vision=VisionConfig(image_size=24, patch_size=8, width=48, layers=2, head_width=16),
    text=TextConfig(context_length=12, vocab_size=40, width=32, layers=1, heads=2),
)


def initialised(config: ModelConfig, seed: int = 0) -> CosmosModel:
    """Return a model with its own initialisation."""
    model = CosmosModel(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def small_batch(samples: int, *, views: tuple[int, int] = (2, 3), captions: int = 4, seed: int = 0) -> Batch:
    """Return a batch for SMALL: crops of 24 and 16 pixels, captions of 3 to 10 ids.

    Ordinary ids include 0, which is padding too.
    """
    crops = ViewsConfig(global_crops=views[0], local_crops=views[1], local_size=16)
    batch = random_batch(SMALL, crops, samples, [(3, 10)] * captions, seed=seed)
    batch.captions[:, :, 1] = 0
    return batch


def ids_as_array(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Tokenize in a child process; here, where a spawned child imports little."""
    return tokenizer(texts).numpy()
