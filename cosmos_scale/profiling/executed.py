"""The floating-point operations of the products that the trainer's step computes: those of `flops.py`, and more.

More than the method needs:

- blocks that are computed again in the backward (`train.recompute`), and the forward without graph where a step has
  several micro-batches;
- in a tower's last block the queries of all tokens; and a first caption's EOT twice, for itself and among the
  caption's tokens;
- tokens that fill up the packed captions, and padding in SDPA's batches;
- logits of the loss that are computed again;
- the interpolation of the position table;
- in the backward of a fused attention, the logits: five products, where two were needed in the forward.

Products of a matrix and a vector are left out: they are bound by memory, and come to less than a thousandth.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from cosmos_scale.batch import Batch
from cosmos_scale.config import ModelConfig, RunConfig
from cosmos_scale.engine.teacher import DTYPES
from cosmos_scale.kernels.attention import choose_backend
from cosmos_scale.kernels.contrastive import BLOCK_ELEMENTS
from cosmos_scale.kernels.contrastive_whole import PAIR_ELEMENTS
from cosmos_scale.kernels.segments import MOST_RUNS, Segments
from cosmos_scale.kernels.serving import serves
from cosmos_scale.model.packing import filling_lengths, token_multiple
from cosmos_scale.profiling.flops import (
    ONE_FACTOR_DATA,
    WITH_BACKWARD,
    TokenCounts,
    Tokens,
    pairs_of_views,
    pixels,
    projections,
    student_tokens,
    teacher_tokens,
    visible_pairs,
)

FUSED_BACKWARD, MATH_BACKWARD = 5 / 2, 4 / 2
"""The operations of an attention's backward by those of its forward: five products, or four, by two."""


class StepDevice(NamedTuple):
    """Where a step runs. math: whether attention is unfused products of whole batches, mask or not."""

    device: torch.device
    dtype: torch.dtype
    math: bool


class ForwardFlops(NamedTuple):
    """The operations of a forward, by what their backward is.

    weights: products of which both factors need gradients. attention: both products of attention. data: products of
    which one factor needs none. weights_again, attention_again: shares of the first two that the backward computes
    again.
    """

    weights: int = 0
    attention: int = 0
    data: int = 0
    weights_again: int = 0
    attention_again: int = 0

    def forward(self) -> int:
        """Return the operations of the forward alone."""
        return self.weights + self.attention + self.data

    def backward(self, attention: float) -> float:
        """Return the operations of the backward; attention: those of attention's backward by its forward's."""
        again = self.weights_again + self.attention_again
        return (
            (WITH_BACKWARD - 1) * self.weights + attention * self.attention + (ONE_FACTOR_DATA - 1) * self.data + again
        )


def executed_flops(
    batch: Batch, config: RunConfig, device: torch.device, world_size: int = 1, *, math: bool = False
) -> int:
    """Return the operations of the products of one step on one rank; batch: the rank's share, on any device.

    device: that of the step. math: attention as torch's math back end computes it, which FlopCounterMode counts; by
    default a fused kernel.
    """
    where = StepDevice(device, DTYPES[config.precision], math)
    parts, total = config.train.micro_batches, 0.0
    for part in batch.split(parts) if parts > 1 else [batch]:
        student = student_forward(part, config, where)
        total += student.forward() * (2 if parts > 1 else 1)  # the first without graph
        total += student.backward(MATH_BACKWARD if math else FUSED_BACKWARD)
        total += teacher_forward(part, config, where).forward()
    return round(total) + executed_loss_flops(batch, config, where, world_size)


def student_forward(batch: Batch, config: RunConfig, where: StepDevice) -> ForwardFlops:
    """Return the operations of the student's forward on a micro-batch."""
    samples = batch.captions.shape[1]
    crops, captions = student_tokens(batch, config)
    parts = _towers(crops, captions, samples, config, where) + _poolers(crops, captions, samples, config, where)
    parts.append(_images(batch, crops, config.model))
    return ForwardFlops(*map(sum, zip(*parts, strict=True)))


def teacher_forward(batch: Batch, config: RunConfig, where: StepDevice) -> ForwardFlops:
    """Return the operations of the teacher's forward on a micro-batch."""
    crops, captions = teacher_tokens(batch, config)
    parts = _towers(crops, captions, 0, config, where)
    parts.append(_images(batch._replace(local_crops=batch.local_crops[:0]), crops, config.model))
    return ForwardFlops(*map(sum, zip(*parts, strict=True)))


def executed_loss_flops(batch: Batch, config: RunConfig, where: StepDevice, world_size: int) -> int:
    """Return the operations of both losses and their gradients on one rank, logits that are computed again included."""
    clip, distill = pairs_of_views(batch, config)
    samples = batch.captions.shape[1]
    columns = world_size * samples
    if world_size == 1 and where.device.type == "cpu" and PAIR_ELEMENTS <= samples**2 <= BLOCK_ELEMENTS:
        of_clip, of_distill = WITH_BACKWARD, ONE_FACTOR_DATA
    elif config.kernels == "auto" and (slices := _fused_slices(where.dtype, where.device, config.model.embed_dim)):
        # Rows' and columns' gradients form the logits each for itself, and for each slice of the width.
        of_clip, of_distill = 1 + 2 * (slices + 1), 1 + slices + 1
    else:
        of_clip, of_distill = WITH_BACKWARD + 1, ONE_FACTOR_DATA + 1
    return (of_clip * clip + of_distill * distill) * 2 * samples * columns * config.model.embed_dim


@lru_cache(maxsize=16)
def _fused_slices(dtype: torch.dtype, device: torch.device, width: int) -> int:
    """Return into how many slices the Triton kernel of the loss cuts the features' width; 0 where it does not serve."""
    if not serves(torch.empty(0, dtype=dtype, device=device)):
        return 0
    from cosmos_scale.kernels.triton_contrastive import TILES, slopes_constants  # here: see contrastive.py

    return -(-width // slopes_constants(TILES, width)["WIDTH"])


def _images(batch: Batch, crops: Tokens, model: ModelConfig) -> ForwardFlops:
    """Return the embedding of patches and the interpolation of positions for crops of other sizes."""
    vision = model.vision
    table = (vision.image_size // vision.patch_size) ** 2
    interpolated = 0
    for images in (batch.global_crops, batch.local_crops):
        height, width = images.shape[-2:]
        patches = (height // vision.patch_size) * (width // vision.patch_size)
        if images.shape[0] and not (height == width and patches == table):
            interpolated += 2 * patches * table * vision.width
    return ForwardFlops(data=pixels(crops, model) + interpolated)


def _towers(crops: Tokens, captions: Tokens, samples: int, config: RunConfig, where: StepDevice) -> list[ForwardFlops]:
    """Return the work of both towers, from embedded tokens to pooled features; samples: first views, read whole."""
    model = config.model
    vision, text = model.vision, model.text
    image = _Tower(vision.width, vision.layers, vision.width // vision.head_width, causal=False)
    caption = _Tower(text.width, text.layers, text.heads, causal=True)
    sizes = np.sort(captions.lengths)[::-1]
    multiple = token_multiple(model.token_multiple, where.device)
    packed = np.concatenate([sizes, filling_lengths(int(sizes.sum()), multiple, text.context_length)])
    recompute = config.train.recompute if samples else 0  # the teacher has no backward
    return [
        _blocks(image, crops.lengths, int(crops.read.sum()), recompute, config, where),
        _blocks(caption, packed, int(captions.read.sum()) + samples, recompute, config, where),
        ForwardFlops(weights=projections(crops, captions, model)),
    ]


class _Tower(NamedTuple):
    width: int
    layers: int
    heads: int
    causal: bool


def _blocks(
    tower: _Tower, lengths: TokenCounts, read: int, recompute: int, config: RunConfig, where: StepDevice
) -> ForwardFlops:
    """Return the work of a tower's blocks; lengths: of all segments as packed. read: tokens after the last block."""
    square, tokens = 2 * tower.width**2, int(lengths.sum())
    whole, last = square * 12 * tokens, square * (3 * tokens + 9 * read)
    attention = _attention(tower, lengths, lengths, config, where)
    again = [number for number in range(tower.layers) if recompute and number % recompute == 0]
    last_again = tower.layers - 1 in again
    return ForwardFlops(
        weights=(tower.layers - 1) * whole + last,
        attention=tower.layers * attention,
        weights_again=(len(again) - last_again) * whole + last_again * last,
        attention_again=len(again) * attention,
    )


def _poolers(crops: Tokens, captions: Tokens, samples: int, config: RunConfig, where: StepDevice) -> list[ForwardFlops]:
    """Return the work of both poolers and token mappings."""
    model = config.model
    pooler = _Tower(model.embed_dim, 1, model.pooler_heads, causal=False)
    work = []
    for token_width, keys, queries in (
        (model.vision.width, crops.lengths[:samples] - 1, len(captions.lengths)),
        (model.text.width, captions.lengths[:samples], len(crops.lengths)),
    ):
        views, tokens = np.full(samples, queries // samples), int(keys.sum())
        mapped = 2 * token_width * model.embed_dim * tokens
        projected = 2 * model.embed_dim**2 * (2 * tokens + 2 * queries)
        work.append(ForwardFlops(weights=mapped + projected, attention=_attention(pooler, views, keys, config, where)))
    return work


def _attention(tower: _Tower, queries: TokenCounts, keys: TokenCounts, config: RunConfig, where: StepDevice) -> int:
    """Return the operations of both products of a block's attention, over the pairs that the back end computes."""
    runs = 1 + np.count_nonzero(np.diff(queries) | np.diff(keys))
    even = runs <= MOST_RUNS and (config.model.attention == "dense" or where.device.type == "cuda")
    name = choose_backend(config.model.attention, where.device, where.dtype, tower.width // tower.heads, bool(even))
    if name == "sdpa":
        groups = Segments(queries.tolist(), keys.tolist()).groups
        count, queries, keys = np.array([(group.size, group.queries, group.keys) for group in groups]).T
    else:
        count = np.ones_like(queries)
    causal = tower.causal and not where.math
    pairs = visible_pairs(queries, causal=True) if causal else queries * keys
    return 4 * tower.width * int((count * pairs).sum())
