"""The curves of a run: points over its steps and hours, thinned to what a picture can show."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from cosmos_scale.report.records import Record, RunRecords, number_of

HOUR = 3600.0


class Point(NamedTuple):
    """A point of a curve; hours: of wall time since the run's start."""

    step: int
    hours: float
    value: float


class Curve(NamedTuple):
    """One line of a picture. key: its name in the page, of letters, digits and dashes. dashed: as the teacher's are."""

    key: str
    label: str
    points: Sequence[Point]
    dashed: bool = False


def curve_of(
    run: RunRecords,
    records: Sequence[Record],
    key: str,
    label: str,
    most: int,
    *,
    scale: float = 1.0,
    dashed: bool = False,
) -> Curve:
    """Return the values under a key of some records, `most` points or fewer; scale: what they are multiplied with."""
    start = start_of(run)
    points = []
    for record in records:
        value = number_of(record, key)
        if value is not None:
            points.append(Point(int(record["step"]), hours_of(record, start), scale * value))
    name = "".join(sign if sign.isalnum() else "-" for sign in key)
    return Curve(name, label, thinned(points, most), dashed)


def start_of(run: RunRecords) -> float | None:
    """Return when a run began, in seconds since 1970: at its first start, or as far back as its first record tells."""
    times = [time for record in run.starts if (time := number_of(record, "time")) is not None]
    for record in run.train[:1]:
        if (time := number_of(record, "time")) is not None:
            steps = int(record["step"]) * (number_of(record, "step_seconds_max") or 0.0)
            times.append(time - (number_of(record, "wall_seconds") or steps))
    return min(times, default=None)


def hours_of(record: Record, start: float | None) -> float:
    """Return how many hours after the start a record was written; nan where no time is known."""
    time = number_of(record, "time")
    return math.nan if time is None or start is None else (time - start) / HOUR


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most `most` points, the first, the last, and the least and greatest value of each span between them.

    So a single spike stays to be seen, however long the run is.
    """
    if len(points) <= most:
        return list(points)
    spans = max(1, (most - 2) // 2)
    inner = range(1, len(points) - 1)
    kept = {0, len(points) - 1}
    value: Callable[[int], float] = lambda place: points[place].value  # noqa: E731
    for span in range(spans):
        places = inner[len(inner) * span // spans : len(inner) * (span + 1) // spans]
        kept |= {min(places, key=value), max(places, key=value)}
    return [points[place] for place in sorted(kept)]


def training_seconds(run: RunRecords) -> float:
    """Return the seconds of all steps with their waits for data, without start-up, evaluations and checkpoints."""
    return sum(seconds for _, seconds in _spans(run))


def rank_seconds(run: RunRecords) -> float | None:
    """Return the same times the ranks that took each step; None where their number is not known."""
    if run.world_size is None:
        return None
    starts = [(int(record["step"]), ranks) for record in run.starts if (ranks := number_of(record, "world_size"))]
    total = 0.0
    for step, seconds in _spans(run):
        ranks = next((ranks for first, ranks in reversed(starts) if first < step), run.world_size)
        total += ranks * seconds
    return total


def _spans(run: RunRecords) -> Iterator[tuple[int, float]]:
    """Yield the step of each record and the seconds of the steps since the record before it, whose mean it holds."""
    before = 0
    for record in run.train:
        step = int(record["step"])
        yield step, (step - before) * (number_of(record, "step_seconds_max") or 0.0)
        before = step


def skipped_steps(run: RunRecords) -> list[int]:
    """Return the steps of the records in which the count of skipped steps grew, or whose loss is not finite."""
    found, before = [], 0.0
    for record in run.train:
        skipped = number_of(record, "skipped_steps") or 0.0
        if skipped > before or (record.get("loss", 0.0) is None):
            found.append(int(record["step"]))
        before = max(before, skipped)
    return found
