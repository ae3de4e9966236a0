"""The gallery of an evaluation: pictures of an index in its own order, each with all its correct texts."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosmos_scale.config import RemoteConfig
from cosmos_scale.data.decode.background import KEEP
from cosmos_scale.data.decode.torch_cpu import evaluation_image
from cosmos_scale.data.samples.caption_keys import is_missing
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.data.shards.index import MergedIndex
from cosmos_scale.data.shards.reader import DEFAULT_REMOTE, ShardReader
from cosmos_scale.errors import UserError


class GalleryBatch(NamedTuple):
    """Some pictures of a gallery with all texts that are correct for each of them.

    images: [N, 3, H, W] float32 on the CPU. texts: N lists. sample_ids: [N] int64, unique in the whole gallery.
    """

    images: Tensor
    texts: Sequence[Sequence[str]]
    sample_ids: Tensor


class Gallery:
    """The first samples of an index, opened once and read as often as they are asked for."""

    def __init__(
        self,
        index: MergedIndex,
        captions_key: str,
        *,
        image_size: int,
        max_pixels: int,
        background: str = KEEP,
        max_samples: int | None = None,
        remote: RemoteConfig = DEFAULT_REMOTE,
    ) -> None:
        """Look for the shards, and for the captions in the first sample's document.

        captions_key: json key of the correct texts, a string or a list of them. background: as
        data.background. max_samples: None for all.
        Raises: UserError where the key is not there, or a shard is missing or stale.
        """
        self._index = index
        self._captions_key = captions_key
        self._image_size, self._max_pixels, self._background = image_size, max_pixels, background
        self._samples = len(index) if max_samples is None else min(len(index), max_samples)
        self._remote = remote
        self._check()

    def batches(self, rank: int, world_size: int, batch: int) -> Iterator[GalleryBatch]:
        """Yield one rank's contiguous slice of the samples, in the index's order, `batch` at a time.

        Ranks together cover each sample once; a slice may be empty. A damaged sample, or one of more than max_pixels,
        is left out and named on stderr.
        Raises: UnreachableShard where a shard cannot be reached any more, after all retries.
        """
        reader = ShardReader(self._remote)
        images: list[Tensor] = []
        texts: list[list[str]] = []
        sample_ids: list[int] = []
        try:
            for sample in range(self._samples * rank // world_size, self._samples * (rank + 1) // world_size):
                location = self._index.locate(sample)
                try:
                    image_bytes, document = reader.read(location)
                    texts_here = _correct_texts(document, self._captions_key)
                    images.append(evaluation_image(image_bytes, self._image_size, self._max_pixels, self._background))
                except DamagedSample as damage:
                    print(f"left out: sample {location.entry.key} of {location.shard}: {damage}", file=sys.stderr)
                    continue
                texts.append(texts_here)
                sample_ids.append(sample)
                if len(images) == batch:
                    yield GalleryBatch(torch.stack(images), texts, torch.tensor(sample_ids))
                    images, texts, sample_ids = [], [], []
            if images:
                yield GalleryBatch(torch.stack(images), texts, torch.tensor(sample_ids))
        finally:
            reader.close()

    def _check(self) -> None:
        location = self._index.locate(0)
        reader = ShardReader(self._remote)
        try:
            reader.check(self._index.shard_files())
            _, document = reader.read(location)
        except DamagedSample:
            return  # left out of the batches, by the rank whose slice it is in
        finally:
            reader.close()
        if self._captions_key not in document:
            raise UserError(
                f"{location.shard}: sample {location.entry.key} has no captions under {self._captions_key!r}; "
                f"its keys are {', '.join(document)}"
            )


def _correct_texts(document: dict[str, Any], captions_key: str) -> list[str]:
    value = document.get(captions_key)
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) or is_missing(text) for text in found):
        raise DamagedSample(f"{captions_key} is neither a string nor a list of strings")
    texts = [text for text in found if isinstance(text, str) and text.strip()]
    if not texts:
        raise DamagedSample(f"{captions_key} holds no text")
    return texts
