"""What a worker makes of the pictures of a batch, by decoder: finished crops, or checked files with their plans.

With both decoders the worker finds damaged pictures, which costs one sample each, and the batch leaves in one block.
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
from cosmos_scale.phases import phase


class Pictures(Protocol):
    """The pictures of one batch under way."""

    def put(self, place: int, image_bytes: bytes, key: SampleKey) -> None:
        """Put an encoded picture at a place of the batch; a second picture replaces the first. Raises DamagedSample."""

    def block(self, others: Sequence[Tensor]) -> TensorBlock:
        """Return the pictures' tensors, followed by other tensors, in one block."""


class Crops:
    """For `decoder: torch`: pictures are decoded and cut here, right into the block; begins as Views."""

    def __init__(self, config: RunConfig, batch: int, *, shared: bool) -> None:
        self._config = config
        self._block = TensorBlock.empty(batch_fields(config, batch), shared=shared)
        self._global_crops, self._local_crops, *self._others = self._block.tensors()

    def put(self, place: int, image_bytes: bytes, key: SampleKey) -> None:
        """Decode a picture and make its views."""
        views, side = self._config.data.views, self._config.model.vision.image_size
        with phase("decode"):
            picture = decode_rgbx(image_bytes, self._config.data.max_pixels, self._config.data.background)
        with phase("plan"):
            plan = plan_views(views, side, key, *picture.shape[:2])
        execute(picture, plan, self._global_crops[:, place], self._local_crops[:, place])

    def block(self, others: Sequence[Tensor]) -> TensorBlock:
        """Return the block that the views lie in, filled up with other tensors."""
        for space, tensor in zip(self._others, others, strict=True):
            space.copy_(tensor)
        return self._block


class EncodedPictures:
    """For `decoder: dali`: pictures are checked here, and the training process decodes them; begins as Encoded."""

    def __init__(self, config: RunConfig, batch: int, *, shared: bool) -> None:
        self._config = config
        self._shared = shared
        self._pictures = [b""] * batch
        self._plans: list[ViewPlan | None] = [None] * batch

    def put(self, place: int, image_bytes: bytes, key: SampleKey) -> None:
        """Check a picture and plan its views."""
        data, side = self._config.data, self._config.model.vision.image_size
        with phase("decode"):
            self._pictures[place], height, width = picture_for_dali(image_bytes, data.max_pixels, data.background)
        with phase("plan"):
            self._plans[place] = plan_views(data.views, side, key, height, width)

    def block(self, others: Sequence[Tensor]) -> TensorBlock:
        """Return a new block of the encoded pictures and other tensors."""
        encoded = stack(self._pictures, [plan for plan in self._plans if plan is not None])
        return TensorBlock.of([*encoded, *others], shared=self._shared)


def start_pictures(config: RunConfig, batch: int, *, shared: bool) -> Pictures:
    """Begin the pictures of a batch. shared: whether the batch will leave this process."""
    return (Crops if config.data.decoder == "torch" else EncodedPictures)(config, batch, shared=shared)


def batch_fields(config: RunConfig, batch: int) -> tuple[Field, ...]:
    """Return the shapes and dtypes of the tensors of Batch."""
    views, captions, model = config.data.views, config.data.captions, config.model
    side, local_side, K = model.vision.image_size, views.local_size, captions.count
    return (
        Field((views.global_crops, batch, 3, side, side), torch.uint8),
        Field((views.local_crops, batch, 3, local_side, local_side), torch.uint8),
        Field((K, batch, model.text.context_length), torch.int32),
        Field((K, batch), torch.int64),
        Field((batch,), torch.int64),
        Field((), torch.int64),
    )
