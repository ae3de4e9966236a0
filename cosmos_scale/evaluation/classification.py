"""Zero-shot classification: each picture goes to the class whose name, in many sentences, it is most like."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from cosmos_scale.config import ClassificationConfig
from cosmos_scale.config.section import redact_urls
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets.labelled_sets import open_labelled_set
from cosmos_scale.evaluation.datasets.pictures import RankPictures
from cosmos_scale.evaluation.evaluator import Encoder, Evaluator, Gather, Numbers, Setting, digest_of
from cosmos_scale.evaluation.text_weights import text_weights
from cosmos_scale.words import counted

LOGIT_SCALE = 100.0  # of the published evaluation; the model's own is not used
SAME_SET = "rule: every host has the same pictures and text files"


class Classification(Evaluator):
    """Top-1, top-5 and the mean of the classes' top-1 on a labelled set, every rank on its share."""

    def __init__(self, config: ClassificationConfig, setting: Setting) -> None:
        """Find the set; raises UserError where its files are not there, or its class names do not match."""
        super().__init__(config, setting)
        self._config = config
        self._set = open_labelled_set(config)
        self._mine = RankPictures(self._set.pictures, setting, config.batch)

    def subject(self) -> dict[str, str]:
        """The layout of the set, and its folder."""
        return {"dataset": self._config.dataset, "data": self._config.data}

    def gallery(self) -> str:
        """The pictures with their labels, the names and the templates, as a count and digests."""
        pictures, names, templates = self._set
        texts = digest_of(repr((names, templates)))
        return f"{pictures.describe()}, {counted(len(names), 'class', 'classes')}, digest {texts}"

    def measure(self, encoder: Encoder, gather: Gather, folder: Path | None) -> Iterator[tuple[str, float]]:
        """Yield how many pictures and classes there are, top1, top5, mean_per_class, chance and what was left out.

        Shares of 1; counts are summed over ranks as integers. mean_per_class is the mean, over the classes that have
        pictures, of the class's own top-1. Source: Radford et al. 2021, section 3.1, and the published evaluation.
        """
        pictures, names, templates = self._set
        device = self.setting.device
        self.require_same_data(gather, SAME_SET)
        weights_CE = text_weights(encoder, names, templates, gather)
        counts_C3 = torch.zeros(len(names), 3, dtype=torch.int64, device=device)
        for images, labels in self._mine.batches():
            logits_NC = LOGIT_SCALE * encoder.images(images).float() @ weights_CE.T
            labels_N = labels.to(device)
            rank_N = ranks_of(logits_NC, labels_N)
            hits_N3 = torch.stack([torch.ones_like(rank_N), rank_N < 1, rank_N < 5], dim=1).long()
            counts_C3.index_add_(0, labels_N, hits_N3)
        counts_C3 = gather(counts_C3[None]).sum(0).cpu()
        damaged = int(gather(torch.tensor([self._mine.damaged], device=device)).sum())
        total, first, fifth = counts_C3.sum(0).tolist()
        if not total:
            raise UserError(f"{redact_urls(self._config.data)}: none of its {len(pictures):,} pictures can be used")
        yield "pictures", total
        yield "classes", len(names)
        yield "top1", first / total
        yield "top5", fifth / total
        yield "mean_per_class", mean_per_class(counts_C3)
        yield "chance_top1", 1 / len(names)
        yield "left_out_damaged", damaged

    def table(self, results: Mapping[str, Numbers], title: str) -> Table:
        """A table of shares in percent: a row a model."""
        first = next(iter(results.values()))
        left_out = int(first["left_out_damaged"])
        said = f"; left out, damaged or too large: {left_out:,}" if left_out else ""
        what = f"{counted(int(first['pictures']), 'picture')}, {counted(int(first['classes']), 'class', 'classes')}"
        caption = f"{what}; chance top-1: {100 * first['chance_top1']:.2f} %{said}"
        table = Table("", "top-1", "top-5", "mean per class", title=title, caption=caption)
        for model, numbers in results.items():
            table.add_row(model, *(f"{100 * numbers[key]:.2f} %" for key in ("top1", "top5", "mean_per_class")))
        return table


def ranks_of(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Return how many classes come before the correct one, for each picture: [N] int64.

    Of equal logits the class with the smaller number comes first. A correct class whose logit is NaN comes last, and
    another class whose logit is NaN before it.
    """
    own_N1 = logits_NC.gather(1, labels_N[:, None])
    smaller_NC = torch.arange(logits_NC.shape[1], device=labels_N.device) < labels_N[:, None]
    before_NC = ~(logits_NC <= own_N1) | ((logits_NC == own_N1) & smaller_NC)
    return before_NC.sum(1)


def mean_per_class(counts_C3: Tensor) -> float:
    """Return the mean of the classes' own top-1, from counts of pictures, top-1 and top-5 hits a class [C, 3] int64."""
    present = counts_C3[:, 0] > 0
    return float((counts_C3[present, 1].double() / counts_C3[present, 0]).mean())
