"""What trackers are given of a step: numbers, tables of results, pictures."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from cosmos_scale.files import regular_only

PICTURES = {".png", ".jpg", ".jpeg"}
MOST_PICTURES = 8  # of a model in one evaluation
LARGEST_PICTURE = 1024  # pixels of its longer side; larger ones are made smaller

EvaluationTable = Mapping[str, Mapping[str, float]]
"""What an evaluator measured: {model: {metric: value}}."""


class TrackerEntry(NamedTuple):
    """What is written of a step: numbers, tables of results and files with pictures, each by its name.

    time: of its record in metrics.jsonl, in seconds since 1970; nan where it has none.
    """

    step: int
    time: float
    numbers: Mapping[str, float]
    tables: Mapping[str, EvaluationTable]
    pictures: Mapping[str, Path]


def pictures_in(folder: Path) -> list[Path]:
    """Return the first pictures of a folder by their names, MOST_PICTURES at most; none where there is no folder."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)[:MOST_PICTURES]
    except OSError:
        return []


def named_pictures(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Return the first pictures that an evaluation has left, by name. folders: by model."""
    return {f"eval/{model}/{path.stem}": path for model, folder in folders.items() for path in pictures_in(folder)}


def read_pictures(entry: TrackerEntry) -> dict[str, Image.Image]:
    """Return an entry's pictures, none over LARGEST_PICTURE; those that are not there any more are left out."""
    found = {}
    for key, path in entry.pictures.items():
        with suppress(OSError), open(path, "rb", opener=regular_only) as file:  # of PIL's errors too
            picture = Image.open(file).convert("RGB")
            picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
            found[key] = picture
    return found


def table_rows(results: EvaluationTable) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return the heads and the rows of a table: a row a metric, a column a model."""
    metrics = dict.fromkeys(metric for numbers in results.values() for metric in numbers)
    rows = [(metric, *(numbers.get(metric) for numbers in results.values())) for metric in metrics]
    return ["metric", *results], rows
