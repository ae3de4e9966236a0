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
- a pair of views in the loss: one B x B product, which serves both directions.

Not counted: recomputation, padding, norms, softmaxes, GELUs, biases, embeddings, the interpolation of positions and the
update. They are no matrix products, or the method does not need them.
"""

from collections.abc import Sequence
from typing import NamedTuple

from cosmos_scale.batch import Batch
from cosmos_scale.config import ModelConfig, RunConfig

WITH_BACKWARD, ONE_FACTOR_DATA = 3, 2


class Tokens(NamedTuple):
    """A segment of a tower. read: how many of its tokens are read after the last block: all, or one."""

    length: int
    read: int


def step_flops(batch: Batch, config: RunConfig) -> int:
    """Return the operations of one step of student, teacher and loss on one rank."""
    return student_flops(batch, config) + teacher_flops(batch, config) + loss_flops(batch, config)


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


def loss_flops(batch: Batch, config: RunConfig) -> int:
    """Return the operations of both losses and their gradients."""
    text_views, samples = batch.captions.shape[:2]
    global_views = batch.global_crops.shape[0]
    student_views = global_views + batch.local_crops.shape[0] + text_views
    teacher_views = global_views + config.data.captions.global_count
    clip, distill = global_views * text_views, student_views * teacher_views
    return (WITH_BACKWARD * clip + ONE_FACTOR_DATA * distill) * 2 * samples * samples * config.model.embed_dim


def student_tokens(batch: Batch, config: RunConfig) -> tuple[list[Tokens], list[Tokens]]:
    """Return the segments of both towers of the student, those of the first view first."""
    samples, context = batch.captions.shape[1:]
    size = config.model.vision.patch_size
    crops = []
    for images in (batch.global_crops, batch.local_crops):
        patches = (images.shape[-2] // size) * (images.shape[-1] // size)
        crops += [Tokens(1 + patches, 1)] * (images.shape[0] * samples)
    crops[:samples] = [Tokens(crop.length, crop.length) for crop in crops[:samples]]
    lengths = batch.caption_lengths.flatten().tolist()
    if config.model.text_padding == "attend":
        lengths[:samples] = [context] * samples
    captions = [Tokens(length, 1) for length in lengths]
    captions[:samples] = [Tokens(caption.length, caption.length) for caption in captions[:samples]]
    return crops, captions


def teacher_tokens(batch: Batch, config: RunConfig) -> tuple[list[Tokens], list[Tokens]]:
    """Return the segments of both towers of the teacher."""
    crops, _ = student_tokens(batch, config)
    views = batch.global_crops.shape[0] * batch.captions.shape[1]
    lengths = batch.caption_lengths[: config.data.captions.global_count].flatten().tolist()
    return [Tokens(crop.length, 1) for crop in crops[:views]], [Tokens(length, 1) for length in lengths]


def towers(crops: Sequence[Tokens], captions: Sequence[Tokens], model: ModelConfig) -> int:
    """Return the operations of both towers' forward, from embedded tokens to pooled features."""
    vision, text = model.vision, model.text
    blocks_flops = blocks(crops, vision.width, vision.layers, causal=False)
    blocks_flops += blocks(captions, text.width, text.layers, causal=True)
    return blocks_flops + 2 * model.embed_dim * (len(crops) * vision.width + len(captions) * text.width)


def blocks(segments: Sequence[Tokens], width: int, layers: int, *, causal: bool) -> int:
    """Return the operations of a tower's blocks: 12 D^2 weights a token and block, and two products of attention."""
    total = 0
    for length, read in segments:
        pairs = length * (length + 1) // 2 if causal else length * length
        # Where one token is read it sees all: a class token, or under the causal mask the last token.
        last_pairs = pairs if read == length else read * length
        weights = (layers - 1) * 12 * length + 2 * length + 10 * read
        total += 2 * width * width * weights + 4 * width * ((layers - 1) * pairs + last_pairs)
    return total


def heads(crops: Sequence[Tokens], captions: Sequence[Tokens], samples: int, model: ModelConfig) -> int:
    """Return the operations of token mappings' and poolers' forward."""
    width, total = model.embed_dim, 0
    towers = (
        (model.vision.width, sum(crop.length - 1 for crop in crops[:samples]), len(captions)),
        (model.text.width, sum(caption.length for caption in captions[:samples]), len(crops)),
    )
    for token_width, tokens, queries in towers:
        mapping = token_width * width * tokens
        projected = width * width * (2 * tokens + 2 * queries)
        attended = 2 * width * tokens * (queries // samples)
        total += 2 * (mapping + projected + attended)
    return total


def pixels(crops: Sequence[Tokens], model: ModelConfig) -> int:
    """Return the operations of embedding patches."""
    patches = sum(crop.length - 1 for crop in crops)
    return 2 * patches * 3 * model.vision.patch_size**2 * model.vision.width
