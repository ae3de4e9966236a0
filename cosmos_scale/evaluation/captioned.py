"""Pictures with all texts that are correct for each of them, whatever they lie in: what retrieval is measured on."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.evaluation.ahead import prepared_blocks
from cosmos_scale.evaluation.left_out import LeftOutWords

NAMED = 20  # samples without captions that a pass names; it names all that are damaged


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


class NoCaptions(DamagedSample):
    """A sample without any text."""


class CaptionedPictures(ABC):
    """Samples in an order that all ranks share, opened once and read as often as they are asked for."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._left_out = LeftOut(0, 0)
        self._words = LeftOutWords()

    def __len__(self) -> int:
        """How many samples there are, with those that cannot be used."""
        return self._samples

    @property
    def left_out(self) -> LeftOut:
        """How many samples the last `batches` left out so far."""
        return self._left_out

    @abstractmethod
    def describe(self) -> str:
        """Say in words and digests what the numbers depend on: equal for galleries of equal samples and texts."""

    def contents(self) -> str:
        """Say in words and digests which bytes there are, for features kept from one evaluation to the next."""
        return self.describe()

    @abstractmethod
    def read(self, sample: int) -> tuple[Callable[[], Tensor], list[str]]:
        """Return what makes the picture [3, H, W] float32, as the model sees it, in any thread, and the texts.

        Both may raise DamagedSample.
        """

    @abstractmethod
    def name(self, sample: int) -> str:
        """Where a sample lies, for people."""

    def close(self) -> None:  # noqa: B027
        """Close what `read` has opened, if anything: called at the end of each pass."""

    def samples_of(self, rank: int, world_size: int, batch: int) -> range:
        """Return one rank's slice of the samples; it may be empty.

        A slice is made of whole blocks of `batch` samples: the batches, and so the last bits of the features, are the
        same on any number of ranks.
        """
        blocks = -(-self._samples // batch)
        first, last = (min(blocks * part // world_size * batch, self._samples) for part in (rank, rank + 1))
        return range(first, last)

    def batches(self, rank: int, world_size: int, batch: int) -> Iterator[GalleryBatch]:
        """Yield one rank's contiguous slice of the samples in order, `batch` at a time.

        Ranks together cover each sample once; a slice may be empty. A damaged sample, one of more than max_pixels, and
        one without captions are left out, counted, and in the first pass named on stderr.
        Raises: UnreachableShard where a shard cannot be reached any more, after all retries.
        """
        self._left_out = LeftOut(0, 0)
        samples = self.samples_of(rank, world_size, batch)
        try:
            for found in prepared_blocks(self._begin, samples, batch, world_size):
                images, texts, sample_ids = [], [], []
                for sample, prepared in found:
                    if isinstance(prepared, DamagedSample):
                        self._leave_out(sample, prepared)
                        continue
                    images.append(prepared[0])
                    texts.append(prepared[1])
                    sample_ids.append(sample)
                if images:
                    yield GalleryBatch(torch.stack(images), texts, torch.tensor(sample_ids))
        finally:
            self.close()

    def _begin(self, sample: int) -> Callable[[], tuple[Tensor, list[str]]]:
        make_image, texts = self.read(sample)
        return lambda: (make_image(), texts)

    def _leave_out(self, sample: int, damage: DamagedSample) -> None:
        without_captions, damaged = self._left_out
        lacks = isinstance(damage, NoCaptions)
        self._left_out = LeftOut(without_captions + lacks, damaged + (not lacks))
        if not lacks or without_captions < NAMED:
            self._words.say(f"{self.name(sample)}: {damage}")
        elif without_captions == NAMED:
            self._words.say("more samples without captions, which are counted and not named")
