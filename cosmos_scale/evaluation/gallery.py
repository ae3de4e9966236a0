"""Batches for evaluation: pictures of an index in its own order, each with all its correct texts."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cosmos_scale.batch import GalleryBatch
from cosmos_scale.config import RemoteConfig
from cosmos_scale.data.decode.torch_cpu import evaluation_image
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.data.shards.index import MergedIndex
from cosmos_scale.data.shards.reader import DEFAULT_REMOTE, ShardReader
from cosmos_scale.errors import UserError


def gallery_batches(
    index: MergedIndex,
    captions_key: str,
    image_size: int,
    rank: int,
    world_size: int,
    batch: int,
    max_samples: int | None,
    max_pixels: int,
    remote: RemoteConfig = DEFAULT_REMOTE,
) -> Iterator[GalleryBatch]:
    """Yield one rank's contiguous slice of the first `max_samples` samples, in the index's order, `batch` at a time.

    captions_key: json key of the correct texts, a string or a list of them. Ranks together cover each sample once; a
    slice may be empty. A damaged sample, or one of more than max_pixels, is left out and named on stderr.
    Raises: UserError where a shard is missing or stale, and what `check_captions` raises, on every rank.
    """
    check_captions(index, captions_key, remote)
    reader = ShardReader(remote)
    samples = len(index) if max_samples is None else min(len(index), max_samples)
    images: list[Tensor] = []
    texts: list[list[str]] = []
    sample_ids: list[int] = []
    for sample in range(samples * rank // world_size, samples * (rank + 1) // world_size):
        location = index.locate(sample)
        try:
            image_bytes, document = reader.read(location)
            texts_here = _correct_texts(document, captions_key)
            images.append(evaluation_image(image_bytes, image_size, max_pixels))
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
    reader.close()


def check_captions(index: MergedIndex, captions_key: str, remote: RemoteConfig = DEFAULT_REMOTE) -> None:
    """Look for the shards, and for a key in the first sample's document.

    Raises: UserError where it is not there, or a shard is missing or stale.
    """
    location = index.locate(0)
    reader = ShardReader(remote)
    try:
        reader.check(index.shard_files())
        _, document = reader.read(location)
    except DamagedSample:
        return  # left out of the batches, by the rank whose slice it is in
    finally:
        reader.close()
    if captions_key not in document:
        raise UserError(
            f"{location.shard}: sample {location.entry.key} has no captions under {captions_key!r}; "
            f"its keys are {', '.join(document)}"
        )


def _correct_texts(document: dict[str, Any], captions_key: str) -> list[str]:
    value = document.get(captions_key)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DamagedSample(f"{captions_key} is neither a string nor a list of strings")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DamagedSample(f"{captions_key} holds no text")
    return texts
