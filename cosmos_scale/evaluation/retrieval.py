"""Image-text retrieval: recall at 1, 5 and 10, mean and median rank in both directions, shared by all ranks.

Every rank encodes its slice of the gallery, receives the features of all slices, and ranks its share of the queries.
The form of the collective is handed in, so that this module knows nothing of process groups.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Column, Table
from torch import Tensor

from cosmos_scale.config import RetrievalConfig
from cosmos_scale.config.section import redact_urls
from cosmos_scale.data.shards.reader import ShardFile
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.captioned import GalleryBatch
from cosmos_scale.evaluation.datasets.captioned_sets import open_captioned
from cosmos_scale.evaluation.evaluator import (
    Encoder,
    Evaluator,
    Gather,
    Numbers,
    Report,
    Setting,
    no_report,
    one_process,
)
from cosmos_scale.evaluation.gallery import Gallery
from cosmos_scale.evaluation.ranking import RECALL_AT, ROWS, RankFigures, best_ranks, rank_figures
from cosmos_scale.words import counted

LEFT_OUT = ("left_out_without_captions", "left_out_damaged")
DIRECTIONS = ("image_to_text", "text_to_image")

EncodeImages = Callable[[Tensor], Tensor]
"""Images [N, 3, H, W] float32 on the CPU to normalised features [N, E] on any device."""
EncodeTexts = Callable[[Sequence[str]], Tensor]
"""Texts to normalised features [N, E] on any device."""


@dataclass(frozen=True)
class RetrievalResult:
    """How many images and texts there are; the ranks of images' best texts, and of texts' images, in figures."""

    images: int
    texts: int
    image_to_text: RankFigures
    text_to_image: RankFigures

    @property
    def chance(self) -> float:
        """Recall at 1 of a guess, from text to image; from image to text too (an image has texts / images texts)."""
        return 1 / self.images

    def as_dict(self) -> Numbers:
        """Flat numbers for JSON: images, texts, chance_R@1, image_to_text_R@1, image_to_text_mean_rank and so on."""
        numbers: Numbers = {"images": self.images, "texts": self.texts, "chance_R@1": self.chance}
        for name, figures in zip(DIRECTIONS, (self.image_to_text, self.text_to_image), strict=True):
            numbers |= {f"{name}_R@{k}": share for k, share in figures.recalls.items()}
            numbers |= {f"{name}_mean_rank": figures.mean_rank, f"{name}_median_rank": figures.median_rank}
        return numbers


class Retrieval(Evaluator):
    """Recall on held-out pairs: the config's gallery, every rank on its slice."""

    def __init__(self, config: RetrievalConfig, setting: Setting) -> None:
        """Open the gallery; raises UserError where its files or its index are not there, or it has no captions."""
        super().__init__(config, setting)
        self._config = config
        self._gallery = open_captioned(config, setting)

    def subject(self) -> dict[str, str]:
        """The set and where it lies; of shards the json key of the captions too."""
        if isinstance(self._gallery, Gallery):
            return {"data": self._config.place, "captions": self._gallery.captions_key}
        return {"dataset": self._config.dataset, "data": self._config.place}

    def gallery(self) -> str:
        """The gallery's samples and captions, in words with digests."""
        return self._gallery.describe()

    def shard_files(self) -> list[ShardFile]:
        """The shards of a gallery of shards."""
        return self._gallery.shard_files() if isinstance(self._gallery, Gallery) else []

    def same_data(self) -> str:
        """The same gallery, in what it lies in."""
        files = "its file of captions along with the pictures"
        if isinstance(self._gallery, Gallery):
            files = "its shards along with their index"
        elif self._config.dataset == "webdataset":
            files = "its shards"
        return f"rule: every host has the same gallery, so copy {files}"

    def measure(self, encoder: Encoder, gather: Gather, folder: Path | None) -> Iterator[tuple[str, float]]:
        """Yield the numbers of `RetrievalResult.as_dict`, and how many samples were left out; leaves no files.

        A cache of the setting keeps the features of the whole gallery.
        """
        setting = self.setting
        self.require_same_data(gather)
        cache = setting.cache if encoder.weights else None
        made_of = (
            json.dumps(["retrieval, equal texts as one", encoder.weights, self._gallery.contents()])
            if cache is not None
            else ""
        )
        kept = cache.load(made_of) if cache is not None else None
        # All ranks go on with what is kept, or none does: their hosts may see different folders.
        if bool(gather(torch.tensor([kept is not None], device=setting.device)).all()) and kept is not None:
            features = GalleryFeatures(*(kept[name].to(setting.device) for name in GalleryFeatures._fields))
            left_out = kept["left_out"]
        else:
            features = self._encoded(encoder, gather)
            left_out = gather(torch.tensor([self._gallery.left_out], device=setting.device)).sum(0)
            if cache is not None and setting.rank == 0:
                cache.save(made_of, {**features._asdict(), "left_out": left_out})
        result = ranked(features, setting.rank, setting.world_size, gather, setting.report)
        yield from result.as_dict().items()
        yield from zip(LEFT_OUT, left_out.tolist(), strict=True)

    def _encoded(self, encoder: Encoder, gather: Gather) -> "GalleryFeatures":
        setting, batch = self.setting, self._config.batch
        batches = self._told(self._gallery.batches(setting.rank, setting.world_size, batch))
        try:
            return encoded_together(encoder.images, encoder.texts, batches, gather, setting.device)
        except EmptyGallery as error:
            raise UserError(f"{redact_urls(self._config.place)}: {error}") from error

    def _told(self, batches: Iterable[GalleryBatch]) -> Iterator[GalleryBatch]:
        """Yield this rank's batches, and report each one when the next one is asked for."""
        samples = self._gallery.samples_of(self.setting.rank, self.setting.world_size, self._config.batch)
        for batch in batches:
            yield batch
            done = int(batch.sample_ids[-1]) + 1 - samples.start  # samples that were left out among them
            self.setting.report("samples", done, len(samples))

    def table(self, results: Mapping[str, Numbers], title: str) -> Table:
        """A table of recalls in percent, and ranks: two rows a model, one for each direction."""
        first = next(iter(results.values()))
        columns = [f"R@{k}" for k in RECALL_AT]
        what = f"{counted(int(first['images']), 'picture')}, {counted(int(first['texts']), 'caption')}"
        caption = f"{what}; chance R@1: {100 * first['chance_R@1']:.2f} %{self._left_out(first)}"
        table = Table("", Column(no_wrap=True), *columns, "mean rank", "median", title=title, caption=caption)
        for model, numbers in results.items():
            for direction in DIRECTIONS:
                recalls = (f"{100 * numbers[f'{direction}_{column}']:.2f} %" for column in columns)
                mean, median = numbers[f"{direction}_mean_rank"], numbers[f"{direction}_median_rank"]
                table.add_row(model, direction.replace("_", " "), *recalls, f"{mean:.1f}", f"{median:,.0f}")
        return table

    def _left_out(self, numbers: Numbers) -> str:
        """Say what the gallery's samples lacked that are not in the numbers; empty where all are in them."""
        without_captions, damaged = (int(numbers[name]) for name in LEFT_OUT)
        samples = int(numbers["images"]) + without_captions + damaged
        under = f" under {self._gallery.captions_key}" if isinstance(self._gallery, Gallery) else ""
        lacks = [(without_captions, f"without captions{under}"), (damaged, "damaged or too large")]
        said = ", ".join(f"{times:,} {lack}" for times, lack in lacks if times)
        return f"; left out of {counted(samples, 'sample')}: {said}" if said else ""


class EmptyGallery(ValueError):
    """A gallery in which no image has a text."""


class GalleryFeatures(NamedTuple):
    """Features of some images and texts: [N, E] float32, and the sample [N] that each belongs to."""

    image: Tensor
    image_sample: Tensor
    text: Tensor
    text_sample: Tensor


@torch.no_grad()
def encoded_together(
    encode_images: EncodeImages,
    encode_texts: EncodeTexts,
    batches: Iterable[GalleryBatch],
    gather: Gather = one_process,
    device: torch.device | None = None,
) -> GalleryFeatures:
    """Return the features of a whole gallery of which `batches` is this rank's slice; every rank returns the same.

    Slices may differ in length, and some may be empty. The features lie on `device` (default: CPU). Equal texts have
    equal features, to the last bit, whatever batches they were in: so their scores are ties at any batch size.
    Raises EmptyGallery, on every rank, if the whole gallery has no text.
    """
    own, keys = _encode(encode_images, encode_texts, batches, device or torch.device("cpu"))
    return _gather_features(own, keys, gather)


@torch.no_grad()
def ranked(
    features: GalleryFeatures,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = one_process,
    report: Report = no_report,
) -> RetrievalResult:
    """Measure retrieval among features that all ranks have: each rank takes whole blocks of the queries.

    A wrong candidate that scores the same as the best correct one, or NaN, is ranked before it: a model whose features
    are all equal, or broken, scores 0.
    """
    images, texts = (features.image, features.image_sample), (features.text, features.text_sample)
    figures = []
    for name, query, candidate in zip(DIRECTIONS, (images, texts), (texts, images), strict=True):
        blocks = -(-len(query[0]) // ROWS)
        bounds = [min(blocks * part // world_size * ROWS, len(query[0])) for part in range(world_size + 1)]
        longest = max(last - first for first, last in itertools.pairwise(bounds))
        mine = range(bounds[rank], bounds[rank + 1])
        own_Q = query[1].new_zeros(longest)
        for first in range(0, len(mine), ROWS):
            rows = mine[first : first + ROWS]
            part, samples = (tensor[rows.start : rows.stop] for tensor in query)
            own_Q[first : first + len(rows)] = best_ranks(part, samples, *candidate)
            report(f"ranks, {name.replace('_', ' ')}", first + len(rows), len(mine))
        parts = gather(own_Q[None])
        shares = itertools.pairwise(bounds)
        ranks_Q = torch.cat([part[: last - first] for part, (first, last) in zip(parts, shares, strict=True)])
        figures.append(rank_figures(ranks_Q, len(candidate[0])))
    return RetrievalResult(len(images[0]), len(texts[0]), *figures)


def _encode(
    encode_images: EncodeImages, encode_texts: EncodeTexts, batches: Iterable[GalleryBatch], device: torch.device
) -> tuple[GalleryFeatures, Tensor]:
    """Encode this rank's slice; without any batch the width is 0. The keys [texts] of equal texts are equal."""
    image, image_sample, text, text_sample, keys = [], [], [], [], []
    for batch in batches:
        image.append(encode_images(batch.images))
        image_sample.append(batch.sample_ids)
        texts = [text for texts in batch.texts for text in texts]
        if texts:
            text.append(encode_texts(texts))
            keys.append(torch.tensor([_key(text) for text in texts]))
            text_sample.append(batch.sample_ids.repeat_interleave(torch.tensor([len(texts) for texts in batch.texts])))
    width = image[0].shape[1] if image else 0

    def joined(parts: list[Tensor], *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.cat(parts).to(device, dtype) if parts else torch.zeros(0, *shape, dtype=dtype, device=device)

    features = GalleryFeatures(
        joined(image, width, dtype=torch.float32),
        joined(image_sample, dtype=torch.int64),
        joined(text, width, dtype=torch.float32),
        joined(text_sample, dtype=torch.int64),
    )
    return features, joined(keys, dtype=torch.int64)


def _key(text: str) -> int:
    """A digest of a text that fits an int64."""
    return int.from_bytes(
        hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big", signed=True
    )


def _first_of_equals(rows: Tensor, keys: Tensor) -> Tensor:
    """Return rows [N, E] in which each row is the first one of its key [N]."""
    _, group_N = keys.unique(return_inverse=True)
    place_N = torch.arange(len(keys), device=keys.device)
    first = place_N.new_full((len(keys),), len(keys)).scatter_reduce(0, group_N, place_N, "amin")
    return rows[first[group_N]]


def _gather_features(own: GalleryFeatures, keys: Tensor, gather: Gather) -> GalleryFeatures:
    """The features of all ranks. Slices are padded to the longest one, as collectives want equal shapes.

    keys: of the rank's texts; all texts of one key receive the feature of the first of them.
    Raises EmptyGallery, on every rank, if there is no image or no text.
    """
    sizes = torch.tensor([[*own.image.shape, len(own.text)]], device=own.image.device)
    images_W, widths_W, texts_W = gather(sizes).T.tolist()
    if not any(images_W) or not any(texts_W):
        raise EmptyGallery("retrieval needs at least one image with a text")
    width = max(widths_W)

    def from_all(rows: Tensor, lengths_W: list[int]) -> Tensor:
        if len(lengths_W) == 1:
            return rows
        padded = rows.new_zeros(max(lengths_W), *((width,) if rows.ndim == 2 else ()))
        padded[: len(rows)] = rows.reshape(len(rows), *padded.shape[1:])
        slices = gather(padded).reshape(len(lengths_W), *padded.shape)
        return torch.cat([piece[:length] for piece, length in zip(slices, lengths_W, strict=True)])

    return GalleryFeatures(
        from_all(own.image, images_W),
        from_all(own.image_sample, images_W),
        _first_of_equals(from_all(own.text, texts_W), from_all(keys, texts_W)),
        from_all(own.text_sample, texts_W),
    )
