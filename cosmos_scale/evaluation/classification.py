"""Zero-shot classification: each picture goes to the class whose name, in many sentences, it is most like."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor

from cosmos_scale.config import ClassificationConfig
from cosmos_scale.config.section import redact_urls
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.confusions import (
    Confused,
    confusion_table,
    summed_over_ranks,
    worst_confusions,
    write_confusions,
)
from cosmos_scale.evaluation.datasets.labelled_sets import open_labelled_set
from cosmos_scale.evaluation.datasets.pictures import RankPictures
from cosmos_scale.evaluation.evaluator import Encoder, Evaluator, Gather, Numbers, Setting, digest_of
from cosmos_scale.evaluation.text_weights import text_weights
from cosmos_scale.words import counted

LOGIT_SCALE = 100.0  # of the published evaluation; the model's own is not used
_SHOWN = 5  # classes that are named where more have no picture
# What every host has the same of, by the layout; all other sets are published ones.
_SAME_PICTURES = {
    "folders": "class folders with the same pictures",
    "imagenet": "class folders with the same pictures",
    "webdataset": "shards",
}


class _Counts(NamedTuple):
    """Counts of one rank. hits: of each class its pictures, hits of top-1, hits of top-5, [C, 3] int64. confusions: how
    often a true class was taken for a predicted one, [C, C] int64.
    """

    hits: Tensor
    confusions: Tensor | None


class Classification(Evaluator):
    """Top-1, top-5 and the mean of the classes' top-1 on a labelled set, every rank on its share."""

    def __init__(self, config: ClassificationConfig, setting: Setting) -> None:
        """Find the set; raises UserError where its files are not there, or its class names do not match."""
        super().__init__(config, setting)
        self._config = config
        self._set = open_labelled_set(config)
        if setting.rank == 0:
            self._set.pairs.warn()
            for said in self._passed_over():
                print(f"left out: {config.data}: {said}", file=sys.stderr)
        self._mine = RankPictures(self._set.pictures, setting, config.batch)
        # Classes of one name, such as ImageNet's two of "sunglasses", share a feature: else rounding would choose.
        self._texts = list(dict.fromkeys(self._set.names))
        self._confused: Sequence[Confused] = []
        filled = set(self._set.pictures.labels)
        self._empty = [of_class[0] for label, of_class in enumerate(self._set.names) if label not in filled]

    def subject(self) -> dict[str, str]:
        """The layout of the set, and its folder."""
        return {"dataset": self._config.dataset, "data": self._config.data}

    def gallery(self) -> str:
        """The pictures with their labels, the names and the templates, as a count and digests."""
        pictures, names, templates, _ = self._set
        texts = digest_of(repr((names, templates)))
        return f"{pictures.describe()}, {counted(len(names), 'class', 'classes')}, digest {texts}"

    def same_data(self) -> str:
        """The same pictures, in what they lie in, with the same names and templates."""
        pictures = _SAME_PICTURES.get(self._config.dataset, f"files of {self._config.dataset}")
        return (
            f"rule: every host has the same {pictures}, and the same files of names and templates, so copy them whole"
        )

    def measure(self, encoder: Encoder, gather: Gather, folder: Path | None) -> Iterator[tuple[str, float]]:
        """Yield how many pictures and classes there are, top1, top5, mean_per_class, chance and what was left out.

        Shares of 1; counts are summed over ranks as integers. mean_per_class is the mean, over the classes that have
        pictures, of the class's own top-1. Source: Radford et al. 2021, section 3.1, and the published evaluation.
        """
        self._confused = []
        self.require_same_data(gather)
        weights_UE = text_weights(encoder, self._texts, self._set.templates, gather)
        counts = self._count(encoder, weights_UE)
        hits_C3 = gather(counts.hits[None]).sum(0).cpu()
        passed_over = sum(map(len, self._set.pictures.passed_over.values()))
        left_out = self._mine.damaged + (passed_over if self.setting.rank == 0 else 0)
        left_out = int(gather(torch.tensor([left_out], device=self.setting.device)).sum())
        total, first, fifth = hits_C3.sum(0).tolist()
        if not total:
            number = counted(len(self._set.pictures), "picture")
            raise UserError(f"{redact_urls(self._config.data)}: none of its {number} can be used")
        if counts.confusions is not None:
            self._keep_confusions(summed_over_ranks(counts.confusions, gather), folder)
        yield "pictures", total
        yield "classes", len(hits_C3)
        yield "top1", first / total
        yield "top5", fifth / total
        yield "mean_per_class", mean_per_class(hits_C3)
        yield "chance_top1", 1 / len(hits_C3)
        yield "pictures_left_out", left_out

    def _count(self, encoder: Encoder, weights_UE: Tensor) -> _Counts:
        """Classify this rank's pictures; weights: a feature for each of the unequal names."""
        device, classes = self.setting.device, len(self._set.names)
        text_C = torch.tensor([self._texts.index(of_class) for of_class in self._set.names], device=device)
        hits_C3 = torch.zeros(classes, 3, dtype=torch.int64, device=device)
        confusions_CC = hits_C3.new_zeros(classes, classes) if self._config.confusions else None
        for images, labels in self._mine.batches():
            logits_NC = (LOGIT_SCALE * encoder.images(images).float() @ weights_UE.T)[:, text_C]
            labels_N = labels.to(device)
            rank_N = ranks_of(logits_NC, labels_N)
            hits_N3 = torch.stack([torch.ones_like(rank_N), rank_N < 1, rank_N < 5], dim=1).long()
            hits_C3.index_add_(0, labels_N, hits_N3)
            if confusions_CC is not None:
                # Where a logit is NaN the first NaN counts as the prediction.
                pairs_N = labels_N * classes + logits_NC.argmax(1)
                confusions_CC.view(-1).index_add_(0, pairs_N, torch.ones_like(pairs_N))
        return _Counts(hits_C3, confusions_CC)

    def _keep_confusions(self, counts_CC: Tensor, folder: Path | None) -> None:
        names = [of_class[0] for of_class in self._set.names]
        self._confused = worst_confusions(counts_CC, names, self._config.confusions)
        if folder is not None and self.setting.rank == 0:
            write_confusions(counts_CC, names, self._confused, folder)

    def details(self) -> Sequence[RenderableType]:
        """The worst confusions, where they were asked for."""
        return [confusion_table(self._confused, "worst confusions")] if self._confused else []

    def table(self, results: Mapping[str, Numbers], title: str) -> Table:
        """A table of shares in percent: a row a model."""
        first = next(iter(results.values()))
        damaged = int(first["pictures_left_out"]) - sum(map(len, self._set.pictures.passed_over.values()))
        said = f"; left out, damaged or too large: {damaged:,}" if damaged else ""
        said += "".join(f"; left out, {passed_over}" for passed_over in self._passed_over())
        what = f"{counted(int(first['pictures']), 'picture')}, {counted(int(first['classes']), 'class', 'classes')}"
        caption = f"{what}; chance top-1: {100 * first['chance_top1']:.2f} %{said}"
        caption += _empty_classes(self._empty)
        if pairs := self._set.pairs.shown:
            caption += f"; {pairs}"
        table = Table("", "top-1", "top-5", "mean per class", title=title, caption=caption)
        for model, numbers in results.items():
            table.add_row(model, *(f"{100 * numbers[key]:.2f} %" for key in ("top1", "top5", "mean_per_class")))
        return table

    def _passed_over(self) -> list[str]:
        """Say of each kind of pictures that lie there, but are none of the set's, how many they are."""
        kinds = self._set.pictures.passed_over.items()
        return [f"{counted(len(names), 'picture')} {why}, such as {names[0]}" for why, names in kinds if names]


def _empty_classes(names: Sequence[str]) -> str:
    """Say which classes have no picture: pictures are taken for them, but they are no part of the mean per class."""
    if not names:
        return ""
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"; {counted(len(names), 'class', 'classes')} without a picture: {shown}"


def ranks_of(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Return how many classes come before the correct one, for each picture: [N] int64.

    Of equal logits the class with the smaller number comes first. A correct class whose logit is NaN comes last, and
    another class whose logit is NaN before it.
    """
    own_N1 = logits_NC.gather(1, labels_N[:, None])
    smaller_NC = torch.arange(logits_NC.shape[1], device=labels_N.device) < labels_N[:, None]
    before_NC = ~(logits_NC <= own_N1) | ((logits_NC == own_N1) & smaller_NC)
    return before_NC.sum(1)


def mean_per_class(hits_C3: Tensor) -> float:
    """Return the mean of the classes' own top-1, from counts of pictures, top-1 and top-5 hits a class [C, 3] int64."""
    present = hits_C3[:, 0] > 0
    return float((hits_C3[present, 1].double() / hits_C3[present, 0]).mean())
