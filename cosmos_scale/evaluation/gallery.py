"""The gallery of an evaluation: pictures of an index in its own order, each with all its correct texts."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosmos_scale.config import RemoteConfig
from cosmos_scale.data.decode.background import KEEP
from cosmos_scale.data.decode.torch_cpu import evaluation_image
from cosmos_scale.data.samples.caption_keys import (
    KNOWN_KEYS,
    KNOWN_NAMES,
    OTHER_NAMES,
    caption_keys,
    is_missing,
    plain_column,
)
from cosmos_scale.data.samples.origin import ORIGIN_KEY
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.data.shards.index import MergedIndex
from cosmos_scale.data.shards.mark import marks_digest
from cosmos_scale.data.shards.reader import DEFAULT_REMOTE, Location, ShardReader
from cosmos_scale.errors import UserError
from cosmos_scale.words import counted

FIRST_KEY = KNOWN_KEYS[0]  # of captions; taken wherever there is one
LOOKED_AT = 512  # samples, spread over the gallery, that tell which keys there are
NAMED = 20  # samples without captions that a pass names; it names all that are damaged
NAME_THE_KEY = "name the key: --captions KEY, in a run's eval section captions: KEY"


class GalleryBatch(NamedTuple):
    """Some pictures of a gallery with all texts that are correct for each of them.

    images: [N, 3, H, W] float32 on the CPU. texts: N lists. sample_ids: [N] int64, unique in the whole gallery.
    """

    images: Tensor
    texts: Sequence[Sequence[str]]
    sample_ids: Tensor


class LeftOut(NamedTuple):
    """How many samples of a gallery have no text under its key, and how many cannot be used: damaged or too large."""

    without_captions: int
    damaged: int


class _NoCaptions(DamagedSample):
    """A sample without any text under the gallery's key."""


class Gallery:
    """The first samples of an index, opened once and read as often as they are asked for.

    captions_key: json key of the correct texts.
    """

    def __init__(
        self,
        index: MergedIndex,
        captions_key: str | None,
        *,
        image_size: int,
        max_pixels: int,
        background: str = KEEP,
        max_samples: int | None = None,
        remote: RemoteConfig = DEFAULT_REMOTE,
    ) -> None:
        """Look for the shards, and for the captions in the samples' documents.

        captions_key: json key of the correct texts, a string or a list of them; None: raw_caption, or else the only
        key of captions there is. background: as data.background. max_samples: None for all.
        Raises: UserError where no sample has such captions, or several keys have, or a shard is missing or stale.
        """
        self._index = index
        self._image_size, self._max_pixels, self._background = image_size, max_pixels, background
        self._samples = len(index) if max_samples is None else min(len(index), max_samples)
        self._remote = remote
        self._left_out = LeftOut(0, 0)
        self.captions_key = self._look_for_captions(captions_key)

    @property
    def left_out(self) -> LeftOut:
        """How many samples the last `batches` left out so far."""
        return self._left_out

    def describe(self) -> str:
        """Say in words and digests what the numbers depend on: equal for galleries of equal samples and texts."""
        marks = marks_digest(file.mark for file in self._index.shard_files())
        shards = f"index {self._index.fingerprint()}, shards {marks or 'without marks'}"
        return f"{counted(self._samples, 'sample')}, {shards}, captions {self.captions_key}"

    def samples_of(self, rank: int, world_size: int) -> range:
        """Return one rank's slice of the samples; it may be empty."""
        return range(self._samples * rank // world_size, self._samples * (rank + 1) // world_size)

    def batches(self, rank: int, world_size: int, batch: int) -> Iterator[GalleryBatch]:
        """Yield one rank's contiguous slice of the samples, in the index's order, `batch` at a time.

        Ranks together cover each sample once; a slice may be empty. A damaged sample, one of more than max_pixels, and
        one without captions are left out, counted and named on stderr.
        Raises: UnreachableShard where a shard cannot be reached any more, after all retries.
        """
        reader = ShardReader(self._remote)
        self._left_out = LeftOut(0, 0)
        images: list[Tensor] = []
        texts: list[list[str]] = []
        sample_ids: list[int] = []
        try:
            for sample in self.samples_of(rank, world_size):
                location = self._index.locate(sample)
                try:
                    image_bytes, document = reader.read(location)
                    texts_here = _correct_texts(document, self.captions_key)
                    images.append(evaluation_image(image_bytes, self._image_size, self._max_pixels, self._background))
                except DamagedSample as damage:
                    self._leave_out(location, damage)
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

    def _leave_out(self, location: Location, damage: DamagedSample) -> None:
        without_captions, damaged = self._left_out
        lacks = isinstance(damage, _NoCaptions)
        self._left_out = LeftOut(without_captions + lacks, damaged + (not lacks))
        if not lacks or without_captions < NAMED:
            print(f"left out: sample {location.entry.key} of {location.shard}: {damage}", file=sys.stderr)
        elif without_captions == NAMED:
            print("left out: more samples without captions, which are counted and not named", file=sys.stderr)

    def _look_for_captions(self, captions_key: str | None) -> str:
        """Return the key of the captions: the one that was asked for, or the one there is."""
        reader = ShardReader(self._remote)
        try:
            reader.check(self._index.shard_files())
            if captions_key is not None:
                self._require(captions_key, reader)
                return captions_key
            return self._only_key(reader)
        finally:
            reader.close()

    def _require(self, captions_key: str, reader: ShardReader) -> None:
        """Raise UserError where no sample has captions under a key."""
        first: tuple[Location, dict[str, Any]] | None = None
        present: Counter[str] = Counter()
        for location, document in self._documents(range(self._samples), reader):
            if _has_texts(document, captions_key):
                return
            first = first or (location, document)
            present.update(key for key in document if key != ORIGIN_KEY)
        if first is None:
            return  # every sample is damaged, which the batches say
        location, document = first
        keys = ", ".join(key for key in document if key != ORIGIN_KEY) or "none"
        others = ", ".join(key for key in present if key not in document)
        raise UserError(
            f"{location.shard}: sample {location.entry.key} has no captions under {captions_key!r}; its keys are "
            f"{keys}; no other of {counted(self._samples, 'sample')} has captions there either"
            + (f", other keys are {others}" if others else "")
            + f"; {NAME_THE_KEY}"
        )

    def _only_key(self, reader: ShardReader) -> str:
        """Return raw_caption where a sample has it, else the only key of captions there is, or raise UserError."""
        spread = sorted({self._samples * place // LOOKED_AT for place in range(LOOKED_AT)})
        rest = sorted(set(range(self._samples)).difference(spread))
        known: Counter[str] = Counter()
        present: Counter[str] = Counter()
        for samples in (spread, rest):
            for _, document in self._documents(samples, reader):
                known.update(key for key in caption_keys(document) if _has_texts(document, key))
                present.update(key for key in document if key != ORIGIN_KEY)
                if FIRST_KEY in known:
                    return FIRST_KEY
            if known:
                break
        shards = self._index.sources[0].shards.shown
        order = [*KNOWN_NAMES, *OTHER_NAMES]
        found_keys = sorted(known, key=lambda key: order.index(plain_column(key)))
        captions = [key for key in found_keys if plain_column(key) in KNOWN_NAMES] or found_keys
        if len(captions) > 1:
            found = ", ".join(f"{key} ({counted(known[key], 'sample')})" for key in captions)
            raise UserError(f"{shards}: its samples have captions under several keys: {found}; {NAME_THE_KEY}")
        if not captions and present:
            accepted, found = ", ".join((*KNOWN_KEYS, *OTHER_NAMES)), ", ".join(present)
            raise UserError(
                f"{shards}: no sample has captions under {accepted}; the keys there are: {found}; {NAME_THE_KEY}"
            )
        return captions[0] if captions else FIRST_KEY  # without any document the batches name what is damaged

    def _documents(self, samples: Iterable[int], reader: ShardReader) -> Iterator[tuple[Location, dict[str, Any]]]:
        """Yield where samples lie, and their documents; damaged samples are left out."""
        for sample in samples:
            location = self._index.locate(sample)
            with suppress(DamagedSample):
                yield location, reader.read(location)[1]


def _has_texts(document: dict[str, Any], captions_key: str) -> bool:
    try:
        return bool(_correct_texts(document, captions_key))
    except DamagedSample:
        return False


def _correct_texts(document: dict[str, Any], captions_key: str) -> list[str]:
    value = document.get(captions_key)
    if is_missing(value):
        raise _NoCaptions(f"no captions under {captions_key}")
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) or is_missing(text) for text in found):
        raise DamagedSample(f"{captions_key} is neither a string nor a list of strings")
    texts = [text for text in found if isinstance(text, str) and text.strip()]
    if not texts:
        raise _NoCaptions(f"{captions_key} holds no text")
    return texts
