"""The floating-point operations that a training step needs in matrix products, at the captions' real lengths.

A product of [m, k] and [k, n] counts 2 m n k. Only operations that the method's numbers depend on are counted, the same
for every implementation:

- tokens: every crop's class token and patches; a caption up to its EOT; the first caption's padding too where the text
  pooler attends to padding. The last block of a tower needs keys and values of all tokens. Its other parts (queries,
  output projection, MLP) are needed only for the tokens that are read: class tokens, EOTs and the first view's tokens.
- attention: both products, over the pairs of a query and a key that the mask lets through.
- backward: each product of the student's forward has two more in the backward, for the gradient of each factor, so it
  counts 3 times. It counts 2 times where one factor is data (pixels; the teacher's features), which needs no gradient.
  The teacher has no backward: its products count once.
- a pair of views in the loss: one product of a rank's B rows and the global batch's G columns, which serves both
  directions.

Not counted: recomputation, padding, norms, softmaxes, GELUs, biases, embeddings, the interpolation of positions and the
update. They are no matrix products, or the method does not need them. `executed.py` counts the products that the
trainer computes.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cosmos_scale.batch import Batch
from cosmos_scale.config import ModelConfig, RunConfig

WITH_BACKWARD, ONE_FACTOR_DATA = 3, 2

TokenCounts = npt.NDArray[np.int64]


class Tokens(NamedTuple):
    """The segments of a tower, those of the first view first.

    lengths: [N] tokens of each segment. read: [N], how many of a segment's tokens are read after the last block: all of
    them, or one.
    """

    lengths: TokenCounts
    read: TokenCounts


def step_flops(batch: Batch, config: RunConfig, world_size: int = 1) -> int:
    """Return the operations of one step of student, teacher and loss on one rank; batch: the rank's share."""
    return student_flops(batch, config) + teacher_flops(batch, config) + loss_flops(batch, config, world_size)


def student_flops(batch: Batch, config: RunConfig) -> int:
    """Return the operations of the student's forward and backward."""
    model = config.model
    crops, captions = student_tokens(batch, config)
    forward = towers(crops, captions, model) + heads(crops, captions, batch.captions.shape[1], model)
    return WITH_BACKWARD * forward + ONE_FACTOR_DATA * pixels(crops, model)


def teacher_flops(batch: Batch, config: RunConfig) -> int:
    """Return the operations of the teacher's forward."""
    crops, captions = teacher_tokens(batch, config)
    return towers(crops, captions, config.model) + pixels(crops, config.model)


def loss_flops(batch: Batch, config: RunConfig, world_size: int = 1) -> int:
    """Return the operations of both losses and their gradients on one rank."""
    clip, distill = pairs_of_views(batch, config)
    samples = batch.captions.shape[1]
    product = 2 * samples * (world_size * samples) * config.model.embed_dim
    return (WITH_BACKWARD * clip + ONE_FACTOR_DATA * distill) * product


def pairs_of_views(batch: Batch, config: RunConfig) -> tuple[int, int]:
    """Return how many pairs of views the clip loss and the distill loss have."""
    text_views, global_views = batch.captions.shape[0], batch.global_crops.shape[0]
    student_views = global_views + batch.local_crops.shape[0] + text_views
    return global_views * text_views, student_views * (global_views + config.data.captions.global_count)


def student_tokens(batch: Batch, config: RunConfig) -> tuple[Tokens, Tokens]:
    """Return the segments of both towers of the student."""
    samples, context = batch.captions.shape[1:]
    sizes = tuple(
        (images.shape[0] * samples, images.shape[-2], images.shape[-1])
        for images in (batch.global_crops, batch.local_crops)
    )
    lengths = batch.caption_lengths.numpy().ravel()
    if config.model.text_padding == "attend":
        lengths = np.concatenate([np.full(samples, context), lengths[samples:]])
    read = np.ones_like(lengths)
    read[:samples] = lengths[:samples]
    return _crop_tokens(sizes, config.model.vision.patch_size, samples), Tokens(lengths, read)


def teacher_tokens(batch: Batch, config: RunConfig) -> tuple[Tokens, Tokens]:
    """Return the segments of both towers of the teacher, which reads one token of each."""
    images = batch.global_crops
    sizes = ((images.shape[0] * images.shape[1], images.shape[-2], images.shape[-1]),)
    lengths = batch.caption_lengths[: config.data.captions.global_count].numpy().ravel()
    return _crop_tokens(sizes, config.model.vision.patch_size, 0), Tokens(lengths, np.ones_like(lengths))


@lru_cache(maxsize=16)
def _crop_tokens(sizes: tuple[tuple[int, int, int], ...], patch: int, all_read: int) -> Tokens:
    """Return the segments of crops of sizes (how many, height, width); the first `all_read` are read whole."""
    lengths = np.repeat(
        [1 + (height // patch) * (width // patch) for _, height, width in sizes], [count for count, _, _ in sizes]
    )
    read = np.ones_like(lengths)
    read[:all_read] = lengths[:all_read]
    for array in (lengths, read):
        array.setflags(write=False)  # kept for the next step
    return Tokens(lengths, read)


def towers(crops: Tokens, captions: Tokens, model: ModelConfig) -> int:
    """Return the operations of both towers' forward, from embedded tokens to pooled features."""
    vision, text = model.vision, model.text
    blocks_flops = blocks(crops, vision.width, vision.layers, causal=False)
    blocks_flops += blocks(captions, text.width, text.layers, causal=True)
    return blocks_flops + projections(crops, captions, model)


def projections(crops: Tokens, captions: Tokens, model: ModelConfig) -> int:
    """Return the operations from both towers' pooled tokens to pooled features."""
    widths = len(crops.lengths) * model.vision.width + len(captions.lengths) * model.text.width
    return 2 * model.embed_dim * widths


def blocks(segments: Tokens, width: int, layers: int, *, causal: bool) -> int:
    """Return the operations of a tower's blocks: 12 D^2 weights a token and block, and two products of attention."""
    lengths, read = segments
    pairs = visible_pairs(lengths, causal=causal)
    # Where one token is read it sees all: a class token, or under the causal mask the last token.
    last_pairs = int(np.where(read == lengths, pairs, read * lengths).sum())
    tokens = int(lengths.sum())
    weights = (layers - 1) * 12 * tokens + 2 * tokens + 10 * int(read.sum())
    return 2 * width * width * weights + 4 * width * ((layers - 1) * int(pairs.sum()) + last_pairs)


def visible_pairs(lengths: TokenCounts, *, causal: bool) -> TokenCounts:
    """Return how many pairs of a query and a key the mask lets through in segments of these lengths."""
    return lengths * (lengths + 1) // 2 if causal else lengths * lengths


def heads(crops: Tokens, captions: Tokens, samples: int, model: ModelConfig) -> int:
    """Return the operations of token mappings' and poolers' forward."""
    width, total = model.embed_dim, 0
    towers = (
        (model.vision.width, int((crops.lengths[:samples] - 1).sum()), len(captions.lengths)),
        (model.text.width, int(captions.lengths[:samples].sum()), len(crops.lengths)),
    )
    for token_width, tokens, queries in towers:
        mapping = token_width * width * tokens
        projected = width * width * (2 * tokens + 2 * queries)
        attended = 2 * width * tokens * (queries // samples)
        total += 2 * (mapping + projected + attended)
    return total


def pixels(crops: Tokens, model: ModelConfig) -> int:
    """Return the operations of embedding patches."""
    patches = int((crops.lengths - 1).sum())
    return 2 * patches * 3 * model.vision.patch_size**2 * model.vision.width
