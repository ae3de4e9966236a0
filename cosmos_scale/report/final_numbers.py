"""Where runs ended: their last numbers side by side."""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from cosmos_scale.report.plots import HEADLINES, MODELS, evaluator_names, numbers_of_models
from cosmos_scale.report.records import RunRecords, number_of
from cosmos_scale.run.logged import evaluator_of

# Keys of training records by what they are called. The last value counts, or of speeds the median.
_LAST = {"loss": "loss", "CLIP loss": "clip", "distillation loss": "distill", "gradient norm": "grad_norm"}
_MEDIAN = {
    "samples a second": "samples_per_second",
    "samples a second and rank": "samples_per_second_per_rank",
    "MFU": "mfu",
}


class TextTable(NamedTuple):
    """A table of texts: the first column says what a row is, the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def final_numbers(runs: Sequence[RunRecords]) -> TextTable | None:
    """Return the last losses and evaluations and the median speed of some runs; None for one run."""
    if len(runs) < 2:
        return None
    rows = [["step", *(f"{run.last_step:,}" for run in runs)]]
    rows += [[name, *(_last(run, key) for run in runs)] for name, key in _LAST.items()]
    for evaluator in evaluator_names(runs):
        for key, title in HEADLINES.items():
            for model in MODELS:
                rows.append([f"{evaluator}: {title}, {model}", *(_share(run, evaluator, key, model) for run in runs)])
    rows += [[f"{name}, median", *(_middle(run, key) for run in runs)] for name, key in _MEDIAN.items()]
    known = [row for row in rows if any(row[1:])]
    return TextTable("Where they ended", ["", *(run.label for run in runs)], known)


def _last(run: RunRecords, key: str) -> str:
    values = [value for record in run.train if (value := number_of(record, key)) is not None]
    return f"{values[-1]:.4g}" if values else ""


def _middle(run: RunRecords, key: str) -> str:
    values = [value for record in run.train if (value := number_of(record, key)) is not None]
    if not values:
        return ""
    middle = median(values)
    if key == "mfu":
        return f"{100 * middle:.1f} %"
    return f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}"


def _share(run: RunRecords, evaluator: str, key: str, model: str) -> str:
    for record in reversed(run.evaluations):
        if evaluator_of(record) == evaluator:
            value = numbers_of_models(record).get(model, {}).get(key)
            return "" if value is None else f"{100 * value:.2f} %"
    return ""
