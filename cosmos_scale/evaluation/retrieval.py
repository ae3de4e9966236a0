"""Image-text retrieval: recall at 1, 5 and 10 in both directions, shared by all ranks.

Every rank encodes its slice of the gallery, receives the features of all slices, and ranks its own rows. The form of
the collective is handed in, so that this module knows nothing of process groups.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from cosmos_scale.config import RetrievalConfig, SourceConfig
from cosmos_scale.config.section import redact_urls
from cosmos_scale.data.shards.index import open_sources
from cosmos_scale.data.shards.index_report import REJECTED
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.evaluator import Encoder, Evaluator, Gather, Numbers, Setting, one_process
from cosmos_scale.evaluation.gallery import Gallery, GalleryBatch
from cosmos_scale.words import counted

RECALL_AT = (1, 5, 10)
NEVER = 1 << 62  # rank of what cannot be found
SAME_GALLERY = "rule: every host has the same gallery, so copy its shards along with their index"
LEFT_OUT = ("left_out_without_captions", "left_out_damaged")

EncodeImages = Callable[[Tensor], Tensor]
"""Images [N, 3, H, W] float32 on the CPU to normalised features [N, E] on any device."""
EncodeTexts = Callable[[Sequence[str]], Tensor]
"""Texts to normalised features [N, E] on any device."""

_ROWS = 1024  # similarities are formed for this many rows at a time: 1024 x 25,000 captions of COCO are 100 MB


@dataclass(frozen=True)
class RetrievalResult:
    """Recall per cut-off as shares of 1: of images that find one of their texts, and of texts that find their image."""

    images: int
    texts: int
    image_to_text: dict[int, float]
    text_to_image: dict[int, float]

    @property
    def chance(self) -> float:
        """Recall at 1 of a guess, from text to image; from image to text too (an image has texts / images texts)."""
        return 1 / self.images

    def as_dict(self) -> Numbers:
        """Flat numbers for JSON: images, texts, chance_R@1, image_to_text_R@1 and so on."""
        directions = (("image_to_text", self.image_to_text), ("text_to_image", self.text_to_image))
        recalls = {f"{name}_R@{k}": value for name, recall in directions for k, value in recall.items()}
        return {"images": self.images, "texts": self.texts, "chance_R@1": self.chance, **recalls}


class Retrieval(Evaluator):
    """Recall on held-out pairs: the config's gallery, every rank on its slice."""

    def __init__(self, config: RetrievalConfig, setting: Setting) -> None:
        """Open the gallery; raises UserError where it has no index, or none of its samples has the captions."""
        super().__init__(config, setting)
        self._config = config
        source = SourceConfig(name=config.name, shards=config.shards, index=config.index)
        index = open_sources([source], setting.remote)
        if setting.rank == 0 and (rejected := index.unindexed().samples):
            where = f"{redact_urls(config.shards)}: not in the index, so in no number"
            print(f"{where}: {counted(rejected, 'sample')} that indexing rejected ({REJECTED})", file=sys.stderr)
        self._gallery = Gallery(
            index,
            config.captions,
            image_size=setting.image_size,
            max_pixels=setting.max_pixels,
            background=setting.background,
            max_samples=config.max_samples,
            remote=setting.remote,
        )

    @property
    def captions(self) -> str:
        """The json key of the captions that count as correct."""
        return self._gallery.captions_key

    def subject(self) -> dict[str, str]:
        """The shards, and the json key of the captions."""
        return {"data": self._config.shards, "captions": self.captions}

    def gallery(self) -> str:
        """The gallery's samples, index, first bytes and captions, in words."""
        return self._gallery.describe()

    def measure(self, encoder: Encoder, gather: Gather, folder: Path | None) -> Iterator[tuple[str, float]]:
        """Yield the numbers of `RetrievalResult.as_dict`, and how many samples were left out; leaves no files."""
        batches = self._told(self._gallery.batches(self.setting.rank, self.setting.world_size, self._config.batch))
        device = self.setting.device
        self.require_same_data(gather, SAME_GALLERY)
        try:
            result = evaluate(encoder.images, encoder.texts, batches, gather=gather, device=device)
        except EmptyGallery as error:
            raise UserError(f"{redact_urls(self._config.shards)}: {error}") from error
        yield from result.as_dict().items()
        left_out = gather(torch.tensor([self._gallery.left_out], device=device)).sum(0).tolist()
        yield from zip(LEFT_OUT, left_out, strict=True)

    def _told(self, batches: Iterable[GalleryBatch]) -> Iterator[GalleryBatch]:
        """Yield this rank's batches, and report each one when the next one is asked for."""
        samples = self._gallery.samples_of(self.setting.rank, self.setting.world_size)
        for batch in batches:
            yield batch
            done = int(batch.sample_ids[-1]) + 1 - samples.start  # samples that were left out among them
            self.setting.report("samples", done, len(samples))

    def table(self, results: Mapping[str, Numbers], title: str) -> Table:
        """A table of recalls in percent: two rows a model, one for each direction."""
        first = next(iter(results.values()))
        columns = [f"R@{k}" for k in RECALL_AT]
        caption = f"chance R@1: {100 * first['chance_R@1']:.2f} %{self._left_out(first)}"
        table = Table("", "", *columns, title=title, caption=caption)
        for model, numbers in results.items():
            for direction in ("image_to_text", "text_to_image"):
                recalls = (f"{100 * numbers[f'{direction}_{column}']:.2f} %" for column in columns)
                table.add_row(model, direction.replace("_", " "), *recalls)
        return table

    def _left_out(self, numbers: Numbers) -> str:
        """Say what the gallery's samples lacked that are not in the numbers; empty where all are in them."""
        without_captions, damaged = (int(numbers[name]) for name in LEFT_OUT)
        samples = int(numbers["images"]) + without_captions + damaged
        lacks = [(without_captions, f"without captions under {self.captions}"), (damaged, "damaged or too large")]
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
def evaluate(
    encode_images: EncodeImages,
    encode_texts: EncodeTexts,
    batches: Iterable[GalleryBatch],
    *,
    gather: Gather = one_process,
    device: torch.device | None = None,
) -> RetrievalResult:
    """Measure retrieval over a gallery of which `batches` is this rank's slice; every rank returns the same result.

    Slices may differ in length, and some may be empty. The ranking runs on `device` (default: CPU). A wrong candidate
    that scores the same as the best correct one, or NaN, is ranked before it: a model whose features are all equal, or
    broken, scores 0.
    Raises EmptyGallery, on every rank, if the whole gallery has no text.
    """
    own = _encode(encode_images, encode_texts, batches, device or torch.device("cpu"))
    everyone = _gather_features(own, gather)
    found_2K = torch.stack(
        [
            _found(own.image, own.image_sample, everyone.text, everyone.text_sample),
            _found(own.text, own.text_sample, everyone.image, everyone.image_sample),
        ]
    )
    found_2K = gather(found_2K[None]).sum(0)
    images, texts = len(everyone.image), len(everyone.text)
    image_to_text, text_to_image = (found_2K.cpu() / torch.tensor([[images], [texts]])).tolist()
    return RetrievalResult(
        images,
        texts,
        dict(zip(RECALL_AT, image_to_text, strict=True)),
        dict(zip(RECALL_AT, text_to_image, strict=True)),
    )


def _encode(
    encode_images: EncodeImages, encode_texts: EncodeTexts, batches: Iterable[GalleryBatch], device: torch.device
) -> GalleryFeatures:
    """Encode this rank's slice; without any batch the width is 0."""
    image, image_sample, text, text_sample = [], [], [], []
    for batch in batches:
        image.append(encode_images(batch.images))
        image_sample.append(batch.sample_ids)
        texts = [text for texts in batch.texts for text in texts]
        if texts:
            text.append(encode_texts(texts))
            text_sample.append(batch.sample_ids.repeat_interleave(torch.tensor([len(texts) for texts in batch.texts])))
    width = image[0].shape[1] if image else 0

    def joined(parts: list[Tensor], *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.cat(parts).to(device, dtype) if parts else torch.zeros(0, *shape, dtype=dtype, device=device)

    return GalleryFeatures(
        joined(image, width, dtype=torch.float32),
        joined(image_sample, dtype=torch.int64),
        joined(text, width, dtype=torch.float32),
        joined(text_sample, dtype=torch.int64),
    )


def _gather_features(own: GalleryFeatures, gather: Gather) -> GalleryFeatures:
    """The features of all ranks. Slices are padded to the longest one, as collectives want equal shapes.

    Raises EmptyGallery, on every rank, if there is no image or no text.
    """
    sizes = torch.tensor([[*own.image.shape, len(own.text)]], device=own.image.device)
    images_W, widths_W, texts_W = gather(sizes).T.tolist()
    if not any(images_W) or not any(texts_W):
        raise EmptyGallery("retrieval needs at least one image with a text")
    width = max(widths_W)

    def from_all(rows: Tensor, lengths_W: list[int]) -> Tensor:
        padded = rows.new_zeros(max(lengths_W), *((width,) if rows.ndim == 2 else ()))
        padded[: len(rows)] = rows.reshape(len(rows), *padded.shape[1:])
        slices = gather(padded).reshape(len(lengths_W), *padded.shape)
        return torch.cat([piece[:length] for piece, length in zip(slices, lengths_W, strict=True)])

    return GalleryFeatures(
        from_all(own.image, images_W),
        from_all(own.image_sample, images_W),
        from_all(own.text, texts_W),
        from_all(own.text_sample, texts_W),
    )


def _found(query: Tensor, query_sample: Tensor, candidate: Tensor, candidate_sample: Tensor) -> Tensor:
    """Count the queries whose best correct candidate is among the first k of RECALL_AT: [3] int64."""
    before_Q = best_ranks(query, query_sample, candidate, candidate_sample)
    return torch.stack([(before_Q < k).sum() for k in RECALL_AT])


def best_ranks(query: Tensor, query_sample: Tensor, candidate: Tensor, candidate_sample: Tensor) -> Tensor:
    """Return how many wrong candidates come before the best correct one of each query: [Q] int64.

    query: [Q, E], candidate: [C, E]; a candidate is correct if it belongs to the query's sample. A wrong candidate that
    scores the same as the best correct one, or NaN, comes before it. The rank of a query without any correct candidate
    is NEVER.
    """
    ranks_Q = torch.empty(len(query), dtype=torch.int64, device=query.device)
    for first in range(0, len(query), _ROWS):
        rows = slice(first, first + _ROWS)
        score_QC = query[rows] @ candidate.T
        correct_QC = query_sample[rows, None] == candidate_sample
        best_Q1 = score_QC.masked_fill(~correct_QC, -torch.inf).amax(1, keepdim=True)
        # "not smaller" instead of "greater or equal": also true of NaN.
        before_Q = (~(score_QC < best_Q1) & ~correct_QC).sum(1)
        ranks_Q[rows] = before_Q.masked_fill(~correct_QC.any(1), NEVER)
    return ranks_Q
