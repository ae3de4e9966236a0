"""The floating-point operations that a training step needs in matrix products, at the captions' real lengths.

A product of [m, k] and [k, n] counts 2 m n k. Counted is what the method's numbers depend on, whoever computes it:

- tokens: every crop's class token and patches; a caption up to its EOT, the first one with its padding where the text
  pooler attends to it. The last block of a tower needs keys and values of all tokens, and the rest of it (queries,
  output projection, MLP) only of the tokens that are read: class tokens and EOTs; the first view's tokens too.
- attention: both products, over the pairs of a query and a key that the mask lets through.
- backward: each product of the student's forward again for either factor, so 3 times its forward; 2 times where one
  factor is data (pixels; the teacher's features), whose gradient nobody needs. The teacher: 1 time.
- a pair of views in the loss: one B x B product, which serves both directions.

Not counted: recomputation, padding, norms, softmaxes, GELUs, biases, embeddings, the interpolation of positions and the
update, which are no products or are not needed as such.
"""

from collections.abc import Iterable
from typing import NamedTuple

from cosmos_scale.batch import Batch
from cosmos_scale.config import ModelConfig, RunConfig

FORWARD, WITH_BACKWARD, ONE_FACTOR_DATA = 1, 3, 2


class Tokens(NamedTuple):
    """A segment of a tower. read: how many of its tokens are read behind the last block: all, or one."""

    length: int
    read: int


def step_flops(batch: Batch, config: RunConfig) -> int:
    """Return the operations of one step of student, teacher and loss on one rank."""
    model = config.model
    crops, captions = student_tokens(batch, config)
    samples = batch.captions.shape[1]
    student = tower(crops, model.vision.width, model.vision.layers, causal=False)
    student += tower(captions, model.text.width, model.text.layers, causal=True)
    student += heads(crops, captions, samples, model)
    student += projections(len(crops), len(captions), model)

    teacher_crops, teacher_captions = teacher_tokens(batch, config)
    teacher = tower(teacher_crops, model.vision.width, model.vision.layers, causal=False)
    teacher += tower(teacher_captions, model.text.width, model.text.layers, causal=True)
    teacher += projections(len(teacher_crops), len(teacher_captions), model) + pixels(teacher_crops, model)

    product = 2 * samples * samples * model.embed_dim
    student_views = (len(crops) + len(captions)) // samples
    teacher_views = (len(teacher_crops) + len(teacher_captions)) // samples
    clip = WITH_BACKWARD * batch.global_crops.shape[0] * batch.captions.shape[0] * product
    distill = ONE_FACTOR_DATA * student_views * teacher_views * product
    return WITH_BACKWARD * student + ONE_FACTOR_DATA * pixels(crops, model) + FORWARD * teacher + clip + distill


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


def tower(segments: Iterable[Tokens], width: int, layers: int, *, causal: bool) -> int:
    """Return the operations of the blocks' forward: 12 D^2 weights for a token, and two products of attention."""
    total = 0
    for length, read in segments:
        pairs = length * (length + 1) // 2 if causal else length * length
        # Of a caption whose EOT alone is read, the query sees all tokens that are kept.
        last_pairs = pairs if read == length else read * length
        weights = (layers - 1) * 12 * length + 2 * length + 10 * read
        total += 2 * width * width * weights + 4 * width * ((layers - 1) * pairs + last_pairs)
    return total


def heads(crops: list[Tokens], captions: list[Tokens], samples: int, model: ModelConfig) -> int:
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


def projections(crops: int, captions: int, model: ModelConfig) -> int:
    """Return the operations of projecting pooled features to the embedding."""
    return 2 * model.embed_dim * (crops * model.vision.width + captions * model.text.width)


def pixels(crops: Iterable[Tokens], model: ModelConfig) -> int:
    """Return the operations of embedding patches."""
    patches = sum(crop.length - 1 for crop in crops)
    return 2 * patches * 3 * model.vision.patch_size**2 * model.vision.width
