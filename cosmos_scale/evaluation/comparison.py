"""What all sets gave, beside what was published: one JSON file and one table in Markdown."""

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_scale.evaluation.all_sets import PublicPlace
from cosmos_scale.evaluation.evaluator import Numbers
from cosmos_scale.evaluation.published import PublishedRow
from cosmos_scale.files import make_folder, replace_file, writing
from cosmos_scale.words import counted

JSON_FILE, MARKDOWN_FILE = "evaluation.json", "evaluation.md"

# The numbers that the table shows, and for some of them the number that an answer that knows nothing has.
_SHOWN: Mapping[str, Mapping[str, str | None]] = {
    "retrieval": {f"{way}_R@{k}": None for k in (1, 5, 10) for way in ("image_to_text", "text_to_image")},
    "classification": {"top1": "chance_top1", "top5": None, "mean_per_class": None},
    "segmentation": {"mIoU": "trivial_mIoU", "aAcc": None, "mAcc": None},
}
_PICTURES = {"retrieval": "images", "classification": "pictures", "segmentation": "pictures"}


class Compared(NamedTuple):
    """A number in percent. trivial: of an answer that knows nothing. difference: in points, measured less published."""

    title: str
    number: str
    weights: str
    measured: float
    trivial: float | None
    published: float | None

    @property
    def difference(self) -> float | None:
        """Measured less published, in points; None where nothing was published."""
        return None if self.published is None else self.measured - self.published


class Measured(NamedTuple):
    """The numbers of one model on one set; subject: what the evaluator says it measured on."""

    place: PublicPlace
    weights: str
    subject: Mapping[str, str]
    numbers: Numbers

    def compared(self, row: PublishedRow | None) -> Iterator[Compared]:
        """Yield the numbers that the table shows."""
        for number, trivial in _SHOWN[self.place.kind].items():
            published = row and row.share(self.place.dataset, number, self.weights, self.place.csa)
            below = None if trivial is None else 100 * self.numbers[trivial]
            yield Compared(self.place.title, number, self.weights, 100 * self.numbers[number], below, published)

    def shortage(self) -> str | None:
        """Say in words where the set did not have the pictures that the whole set has."""
        used = int(self.numbers[_PICTURES[self.place.kind]])
        if used == self.place.pictures:
            return None
        return f"{self.place.title}: {counted(used, 'picture')} used, of {self.place.pictures:,} of the whole set"


@dataclass
class Results:
    """All that `eval all` found. published: the name of the published row, with its numbers; None: no comparison.

    missing: the layout that was expected, by the name of the set. failed: why a set could not be measured, by title.
    """

    checkpoint: str
    data_root: str
    names: str
    published: str | None
    row: PublishedRow | None
    measured: list[Measured] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def compared(self) -> list[Compared]:
        """All rows of the table: sets in their order, the models of a set side by side."""
        rows = [row for one in self.measured for row in one.compared(self.row)]
        titles = list(dict.fromkeys(row.title for row in rows))
        numbers = list(dict.fromkeys(row.number for row in rows))
        return sorted(rows, key=lambda row: (titles.index(row.title), numbers.index(row.number)))

    def notes(self) -> list[str]:
        """What must be known of the numbers."""
        shortages = [said for one in self.measured if (said := one.shortage())]
        caveats = list(self.row.caveats) if self.row else []
        if self.row and self.names != "published":
            caveats.append("These numbers are measured with corrected names, the published ones are not.")
        return [*dict.fromkeys(shortages), *caveats]

    def as_json(self) -> dict[str, Any]:
        """Everything, shares of 1 as measured and the comparison in percent."""
        return {
            "checkpoint": self.checkpoint,
            "data_root": self.data_root,
            "names": self.names,
            "published": self.published,
            "results": [
                {"set": one.place.title, "kind": one.place.kind, "weights": one.weights, **one.subject, **one.numbers}
                for one in self.measured
            ],
            "comparison": [
                {**row._asdict(), "difference": row.difference} for row in self.compared() if row.published is not None
            ],
            "not_found": self.missing,
            "failed": self.failed,
            "notes": self.notes(),
        }

    def as_markdown(self) -> str:
        """A table for people, with what was not found, what failed, and what must be known of published numbers."""
        lines = [f"# {self.checkpoint}", "", f"Data: {self.data_root}. In percent; differences in points.", ""]
        head = (
            "set",
            "number",
            "model",
            "measured",
            "trivial",
            f"published ({self.published or 'none'})",
            "difference",
        )
        lines += _row(head), _row(["---"] * 3 + ["---:"] * 4)
        for row in self.compared():
            figures = (f"{row.measured:.2f}", *map(_percent, (row.trivial, row.published)), _signed(row.difference))
            lines.append(_row((row.title, row.number, row.weights, *figures)))
        lines += ["", "Trivial: chance, or the mIoU of one label everywhere.", ""]
        lines += _list("Notes", self.notes())
        lines += _list("Failed", [f"{title}: {reason}" for title, reason in self.failed.items()])
        lines += _list("Not found", [f"{name}: expected {layout}" for name, layout in self.missing.items()])
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Write both files, in place of those that were there; raises UserError where they cannot be written."""
        make_folder(folder)
        replace_file(folder / JSON_FILE, (json.dumps(self.as_json(), indent=2) + "\n").encode())
        replace_file(folder / MARKDOWN_FILE, self.as_markdown().encode(errors="surrogateescape"))


def keep_earlier(folder: Path) -> Path | None:
    """Give an earlier command's files of a folder the names evaluation.1.json and .md, or the next number's.

    Returns where its numbers are now, None where there are none. They may be of another checkpoint, and took hours.
    Raises UserError where they cannot be moved.
    """
    earlier = folder / JSON_FILE
    if not earlier.is_file():
        return None
    number = next(n for n in itertools.count(1) if not os.path.lexists(_kept(earlier, n)))
    for path in (folder / MARKDOWN_FILE, earlier):  # the numbers last: killed between the two, it begins again
        with writing(path), suppress(FileNotFoundError):
            path.rename(_kept(path, number))
    return _kept(earlier, number)


def _kept(path: Path, number: int) -> Path:
    return path.with_suffix(f".{number}{path.suffix}")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _list(heading: str, items: Sequence[str]) -> list[str]:
    return [f"## {heading}", "", *(f"- {item}" for item in items), ""] if items else []


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2f}"


def _signed(points: float | None) -> str:
    return "" if points is None else f"{points:+.2f}"
