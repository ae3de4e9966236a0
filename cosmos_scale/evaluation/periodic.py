"""Retrieval during training: the gallery opened once, student and teacher measured whenever it is asked for."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from cosmos_scale.batch import GalleryBatch
from cosmos_scale.config import RunConfig, SourceConfig
from cosmos_scale.config.section import redact_urls
from cosmos_scale.data.shards.index import open_sources
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.gallery import check_captions, gallery_batches
from cosmos_scale.evaluation.retrieval import Gather, RetrievalResult, evaluate
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.model.tokenizer import Tokenizer


class PeriodicRetrieval:
    """Measures models on the run's held-out pairs, every rank on its slice."""

    def __init__(
        self, config: RunConfig, tokenizer: Tokenizer, rank: int, world_size: int, device: torch.device
    ) -> None:
        """Open the gallery; raises UserError where it has no index, or its first sample cannot be used as asked for."""
        assert config.eval.retrieval is not None
        self.config = config.eval.retrieval
        self.image_size, self.max_pixels = config.model.vision.image_size, config.data.max_pixels
        self.remote = config.data.remote
        self.tokenizer = tokenizer
        self.rank, self.world_size, self.device = rank, world_size, device
        source = SourceConfig(name="eval.retrieval", shards=self.config.shards, index=self.config.index)
        self.index = open_sources([source])
        try:  # now, not hours later, at the first evaluation
            check_captions(self.index, self.config.captions, self.remote)
        except UserError as error:
            raise UserError(f"eval.retrieval: {error}") from error

    def run(self, model: CosmosModel, gather: Gather) -> tuple[RetrievalResult | None, UserError | None]:
        """The result, and this rank's error, if any, for the caller to share: others wait in collectives."""
        result, error = None, None
        batches = _Guarded(self._batches())
        try:
            result = evaluate(
                partial(self._encode_images, model),
                partial(self._encode_texts, model),
                batches,
                gather=gather,
                device=self.device,
            )
        except ValueError as failure:  # raised on every rank alike
            error = UserError(f"eval.retrieval: {redact_urls(self.config.shards)}: {failure}")
        return result, batches.error or error

    def _encode_images(self, model: CosmosModel, images: Tensor) -> Tensor:
        return model.encode_image(images.to(self.device))

    def _encode_texts(self, model: CosmosModel, texts: Sequence[str]) -> Tensor:
        return model.encode_text(self.tokenizer(texts).to(self.device))

    def _batches(self) -> Iterator[GalleryBatch]:
        return gallery_batches(
            self.index,
            self.config.captions,
            self.image_size,
            self.rank,
            self.world_size,
            self.config.batch,
            self.config.max_samples,
            self.max_pixels,
            self.remote,
        )


class _Guarded(Iterable[GalleryBatch]):
    """Batches that end at an error and keep it: the collectives behind them must still be reached."""

    def __init__(self, batches: Iterator[GalleryBatch]) -> None:
        self._batches = batches
        self.error: UserError | None = None

    def __iter__(self) -> Iterator[GalleryBatch]:
        try:
            yield from self._batches
        except UserError as error:
            self.error = error
