"""The gallery of an evaluation: pictures of an index in its own order, each with all its correct texts."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from cosmos_scale.config import RemoteConfig
from cosmos_scale.data.decode.background import KEEP
from cosmos_scale.data.decode.torch_cpu import evaluation_image
from cosmos_scale.data.samples.caption_keys import (
    KNOWN_KEYS,
    KNOWN_NAMES,
    OTHER_NAMES,
    caption_keys,
    further_captions,
    is_missing,
    plain_column,
)
from cosmos_scale.data.samples.origin import ORIGIN_KEY
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.data.shards.index import MergedIndex
from cosmos_scale.data.shards.mark import marks_digest
from cosmos_scale.data.shards.reader import DEFAULT_REMOTE, Location, ShardFile, ShardReader
from cosmos_scale.data.training.picture_check import LOOKED_AT as PICTURES
from cosmos_scale.data.training.picture_check import picture_sizes
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.captioned import CaptionedPictures, NoCaptions
from cosmos_scale.words import counted

FIRST_KEY = KNOWN_KEYS[0]  # of captions; taken wherever there is one
LOOKED_AT = 512  # samples, spread over the gallery, that tell which keys there are
NAME_THE_KEY = "name the key: --captions KEY, in a run's eval section captions: KEY"


class Gallery(CaptionedPictures):
    """The first samples of an index, opened once and read as often as they are asked for.

    captions_key: json key of the correct texts. unread: keys of further texts, where captions_key was not asked for.
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
        super().__init__(len(index) if max_samples is None else min(len(index), max_samples))
        self._remote = remote
        self._reader: ShardReader | None = None
        self.unread: list[str] = []
        self.captions_key = self._look_for_captions(captions_key)

    def describe(self) -> str:
        """Say in words and digests what the numbers depend on: equal for galleries of equal samples and texts."""
        marks = marks_digest(file.mark for file in self._index.shard_files())
        shards = f"index {self._index.fingerprint()}, shards {marks or 'without marks'}"
        return f"{counted(self._samples, 'sample')}, {shards}, captions {self.captions_key}"

    def shard_files(self) -> list[ShardFile]:
        """Return the shards of the samples, without those behind the last one."""
        starts = np.cumsum(self._index.shard_samples) - self._index.shard_samples
        return [file for file, start in zip(self._index.shard_files(), starts, strict=True) if start < self._samples]

    def oversized(self) -> str:
        """Say how many pictures exceed max_pixels, of some that are looked at; empty where none does."""
        spread = sorted({self._samples * place // PICTURES for place in range(PICTURES)})
        sizes = picture_sizes(self._index, spread, self._max_pixels, self._remote)
        return sizes.describe(self._max_pixels) if sizes.too_large else ""

    def read(self, sample: int) -> tuple[Callable[[], Tensor], list[str]]:
        """Read a sample; raises DamagedSample, and UnreachableShard where its shard cannot be reached."""
        self._reader = self._reader or ShardReader(self._remote)
        image_bytes, document = self._reader.read(self._index.locate(sample))
        texts = _correct_texts(document, self.captions_key)
        return partial(evaluation_image, image_bytes, self._image_size, self._max_pixels, self._background), texts

    def name(self, sample: int) -> str:
        """The sample's key, and its shard."""
        location = self._index.locate(sample)
        return f"sample {location.entry.key} of {location.shard}"

    def close(self) -> None:
        """Close the shards."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

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
                self.unread += [key for key in further_captions(document) if key not in self.unread]
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
        raise NoCaptions(f"no captions under {captions_key}")
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) or is_missing(text) for text in found):
        raise DamagedSample(f"{captions_key} is neither a string nor a list of strings")
    texts = [text for text in found if isinstance(text, str) and text.strip()]
    if not texts:
        raise NoCaptions(f"{captions_key} holds no text")
    return texts
