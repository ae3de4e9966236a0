"""What a worker makes of the pictures of a batch, by decoder: finished crops, or checked files with their plans.

Either way a damaged picture shows in the worker, where it costs one sample, and the batch leaves in one block.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cosmos_scale.config import RunConfig
from cosmos_scale.data.decode.blocks import Field, TensorBlock
from cosmos_scale.data.decode.dali import picture_for_dali, stack
from cosmos_scale.data.decode.picture import decode_rgbx
from cosmos_scale.data.decode.torch_cpu import execute
from cosmos_scale.data.samples.sample import SampleKey
from cosmos_scale.data.samples.view_plan import ViewPlan, plan_views


class Pictures(Protocol):
    """The pictures of one batch under way."""

    def put(self, place: int, image_bytes: bytes, key: SampleKey) -> None:
        """Take an encoded picture as one of the batch; a later one takes its place. Raises DamagedSample."""

    def block(self, others: Sequence[Tensor]) -> TensorBlock:
        """The pictures' tensors and then others, in one block."""


class Crops:
    """For `decoder: torch`: decoded and cut here, right into the block; its first tensors are those of Views."""

    def __init__(self, config: RunConfig, batch: int, *, shared: bool) -> None:
        self._config = config
        self._block = TensorBlock.empty(batch_fields(config, batch), shared=shared)
        self._global_crops, self._local_crops, *self._others = self._block.tensors()

    def put(self, place: int, image_bytes: bytes, key: SampleKey) -> None:
        """Decode a picture and make its views."""
        views, side = self._config.data.views, self._config.model.vision.image_size
        picture = decode_rgbx(image_bytes, self._config.data.max_pixels)
        plan = plan_views(views, side, key, *picture.shape[:2])
        execute(picture, plan, self._global_crops[:, place], self._local_crops[:, place])

    def block(self, others: Sequence[Tensor]) -> TensorBlock:
        """The block that the views lie in, filled up."""
        for space, tensor in zip(self._others, others, strict=True):
            space.copy_(tensor)
        return self._block


class EncodedPictures:
    """For `decoder: dali`: checked here, to be decoded by the training process; the first tensors are Encoded's."""

    def __init__(self, config: RunConfig, batch: int, *, shared: bool) -> None:
        self._config = config
        self._shared = shared
        self._pictures = [b""] * batch
        self._plans: list[ViewPlan | None] = [None] * batch

    def put(self, place: int, image_bytes: bytes, key: SampleKey) -> None:
        """Check a picture and plan its views."""
        views, side = self._config.data.views, self._config.model.vision.image_size
        self._pictures[place], height, width = picture_for_dali(image_bytes, self._config.data.max_pixels)
        self._plans[place] = plan_views(views, side, key, height, width)

    def block(self, others: Sequence[Tensor]) -> TensorBlock:
        """A new block."""
        encoded = stack(self._pictures, [plan for plan in self._plans if plan is not None])
        return TensorBlock.of([*encoded, *others], shared=self._shared)


def start_pictures(config: RunConfig, batch: int, *, shared: bool) -> Pictures:
    """Begin a batch. shared: whether it will leave this process."""
    return (Crops if config.data.decoder == "torch" else EncodedPictures)(config, batch, shared=shared)


def batch_fields(config: RunConfig, batch: int) -> tuple[Field, ...]:
    """The tensors of Batch."""
    views, captions, model = config.data.views, config.data.captions, config.model
    side, local_side, K = model.vision.image_size, views.local_size, captions.count
    return (
        Field((views.global_crops, batch, 3, side, side), torch.float32),
        Field((views.local_crops, batch, 3, local_side, local_side), torch.float32),
        Field((K, batch, model.text.context_length), torch.int32),
        Field((K, batch), torch.int64),
        Field((batch,), torch.int64),
        Field((), torch.int64),
    )
