"""A retrieval to look at: what a model finds for captions and pictures of held-out pairs, and where it is worst."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from cosmos_scale.config import RetrievalConfig
from cosmos_scale.evaluation.attention_maps import levels_of
from cosmos_scale.evaluation.captioned import GalleryBatch
from cosmos_scale.evaluation.datasets.captioned_sets import open_captioned
from cosmos_scale.evaluation.evaluator import Encoder, Report
from cosmos_scale.evaluation.ranking import best_ranks
from cosmos_scale.report.pictures import PagePicture, picture_of

PAIRS = 256  # that are searched among
QUERIES, WORST, FOUND = 5, 8, 5
SIDE = 112  # pixels of a picture on the page


class FoundPicture(NamedTuple):
    """A picture that a caption found. right: whether it is the caption's own."""

    picture: PagePicture
    right: bool


class CaptionQuery(NamedTuple):
    """A caption and the pictures found for it, best first. rank: of its own picture, from 1. own: that picture."""

    caption: str
    rank: int
    own: PagePicture
    found: Sequence[FoundPicture]


class PictureQuery(NamedTuple):
    """A picture and the captions found for it, best first, each with whether it is the picture's own."""

    picture: PagePicture
    rank: int
    found: Sequence[tuple[str, bool]]


class Retrieved(NamedTuple):
    """What a model found among some pairs; worst: the captions whose own pictures come last."""

    evaluator: str
    pairs: int
    captions: Sequence[CaptionQuery]
    pictures: Sequence[PictureQuery]
    worst: Sequence[CaptionQuery]


class _Pairs(NamedTuple):
    """Encoded pairs: the first caption of each picture. images, texts: [N, E]. shown: [N, H, W, 3] uint8."""

    images: Tensor
    texts: Tensor
    shown: Tensor
    captions: list[str]


def retrieve(section: RetrievalConfig, encoder: Encoder, report: Report) -> Retrieved | None:
    """Search among the first pairs of a section's gallery; None where it has none that can be used.

    Raises UserError where the gallery is not there. report: told how many pairs are encoded.
    """
    most = min(PAIRS, section.max_samples or PAIRS)
    gallery = open_captioned(section.model_copy(update={"max_samples": most}), encoder.setting)
    parts = []
    for batch in gallery.batches(0, 1, section.batch):
        parts.append(_encoded(batch, encoder))
        report("retrieval gallery", int(batch.sample_ids[-1]) + 1, len(gallery))
    if not parts:
        return None
    images, texts, shown = (torch.cat(tensors) for tensors in list(zip(*parts, strict=True))[:3])
    pairs = _Pairs(images, texts, shown, [caption for part in parts for caption in part.captions])
    scores = pairs.texts @ pairs.images.T  # [captions, pictures]
    each = torch.arange(len(scores))
    rank_of_captions = 1 + best_ranks(pairs.texts, each, pairs.images, each)
    rank_of_pictures = 1 + best_ranks(pairs.images, each, pairs.texts, each)
    asked = torch.linspace(0, len(scores) - 1, min(QUERIES, len(scores))).long().tolist()
    worst = rank_of_captions.argsort(descending=True, stable=True)[:WORST].tolist()
    return Retrieved(
        section.name,
        len(scores),
        [_caption_query(pairs, scores, query, int(rank_of_captions[query])) for query in asked],
        [_picture_query(pairs, scores, query, int(rank_of_pictures[query])) for query in asked],
        [_caption_query(pairs, scores, query, int(rank_of_captions[query]), found=1) for query in worst],
    )


@torch.no_grad()
def _encoded(batch: GalleryBatch, encoder: Encoder) -> _Pairs:
    captions = [texts[0] for texts in batch.texts]
    shown = torch.stack([levels_of(image) for image in batch.images])
    return _Pairs(encoder.images(batch.images).float().cpu(), encoder.texts(captions).float().cpu(), shown, captions)


def _caption_query(pairs: _Pairs, scores: Tensor, query: int, rank: int, found: int = FOUND) -> CaptionQuery:
    best = scores[query].argsort(descending=True)[:found].tolist()
    shown = [FoundPicture(_picture(pairs, one), one == query) for one in best]
    return CaptionQuery(pairs.captions[query], rank, _picture(pairs, query), shown)


def _picture_query(pairs: _Pairs, scores: Tensor, query: int, rank: int) -> PictureQuery:
    best = scores[:, query].argsort(descending=True)[:FOUND].tolist()
    return PictureQuery(_picture(pairs, query), rank, [(pairs.captions[one], one == query) for one in best])


def _picture(pairs: _Pairs, one: int) -> PagePicture:
    return picture_of(Image.fromarray(pairs.shown[one].numpy()), pairs.captions[one], width=SIDE)
