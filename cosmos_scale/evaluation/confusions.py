"""Which classes are taken for which: a picture of all confusions, and the most frequent ones as a table."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from cosmos_scale.drawing import usual_figures
from cosmos_scale.evaluation.evaluator import Gather
from cosmos_scale.files import make_folder, whole_file, writing
from cosmos_scale.words import figure_text

PICTURE, LIST = "confusions.png", "confusions.csv"
_NAMED = 50  # classes whose names fit beside a picture
_ROWS = 256  # of a matrix gathered at a time: 256 x 1,000 counts of 64 bits are 2 MB a rank


class Confused(NamedTuple):
    """Pictures of one class taken for another: how many, and which share of that class's pictures."""

    truth: str
    taken_for: str
    pictures: int
    share: float


def summed_over_ranks(counts_CC: Tensor, gather: Gather) -> Tensor:
    """Return the sum of all ranks' counts [C, C] int64, on the CPU; a few rows of all ranks lie in memory at a time."""
    return torch.cat([gather(rows_RC[None]).sum(0).cpu() for rows_RC in counts_CC.split(_ROWS)])


def worst_confusions(counts_CC: Tensor, names: Sequence[str], most: int) -> list[Confused]:
    """Return the pairs of classes that are confused most often, the most frequent first.

    counts: [true class, predicted class] int64. Of equally frequent pairs the one with the smaller numbers comes first.
    """
    wrong_CC = counts_CC.clone().fill_diagonal_(0)
    order = wrong_CC.flatten().sort(descending=True, stable=True).indices[:most].tolist()
    totals = counts_CC.sum(1).tolist()
    found = []
    for place in order:
        truth, taken_for = divmod(place, len(names))
        pictures = int(wrong_CC[truth, taken_for])
        if pictures:
            found.append(Confused(names[truth], names[taken_for], pictures, pictures / totals[truth]))
    return found


def confusion_table(found: Sequence[Confused], title: str) -> Table:
    """Return a table for people."""
    table = Table("class", "taken for", "pictures", "of the class", title=title)
    for confused in found:
        table.add_row(confused.truth, confused.taken_for, f"{confused.pictures:,}", f"{100 * confused.share:.1f} %")
    return table


def write_confusions(counts_CC: Tensor, names: Sequence[str], found: Sequence[Confused], folder: Path) -> None:
    """Write the list of some confusions, and the picture of all; raises UserError where they cannot be written.

    Names of folders that are no UTF-8 keep their bytes in the list, and have them escaped in the picture.
    """
    make_folder(folder)
    with (
        writing(folder / LIST),
        whole_file(folder / LIST) as part,
        part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        rows = csv.writer(file)
        rows.writerow(Confused._fields)
        rows.writerows(found)
    _draw(counts_CC, names, folder / PICTURE)


@usual_figures()
def _draw(counts_CC: Tensor, names: Sequence[str], path: Path) -> None:
    """Draw the shares of each class's pictures: rows are true classes, columns predicted ones."""
    from matplotlib.figure import Figure  # here: it takes half a second

    shares_CC = counts_CC.double() / counts_CC.sum(1, keepdim=True).clamp(min=1)
    side = min(14.0, 4.0 + 0.22 * len(names))
    figure = Figure(figsize=(side + 1.0, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares_CC.numpy(), vmin=0.0, vmax=1.0, cmap="viridis", interpolation="nearest")
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if len(names) <= _NAMED:
        names = [figure_text(name) for name in names]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    with writing(path), whole_file(path) as part:
        figure.savefig(part, format="png", dpi=120)
