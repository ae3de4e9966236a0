"""What happened to a run, in the order of time: starts, resumes, evaluations, checkpoints, skipped steps, damage."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from cosmos_scale.report.code import NOT_RECORDED, code_of
from cosmos_scale.report.plots import HEADLINES, MODELS, numbers_of_models
from cosmos_scale.report.records import Record, RunRecords, number_of
from cosmos_scale.report.series import skipped_steps
from cosmos_scale.run.logged import evaluator_of
from cosmos_scale.words import counted

LONG_PAUSE, PAUSE_STEPS = 60.0, 10  # a gap is a pause where it is longer than these seconds and steps
FEW, LAST = 40, 160  # of more events than both the first and the last ones are shown


class Event(NamedTuple):
    """Something that happened. time: seconds since 1970, nan where it is not known."""

    time: float
    step: int
    kind: str
    said: str


def events_of(run: RunRecords) -> list[Event]:
    """Return all that is known to have happened, by step and time."""
    found = [*_starts(run), *_stops(run), *_evaluations(run), *_checkpoints(run), *_skipped(run), *_damage(run)]
    if not run.starts:
        found += _pauses(run)
    return sorted(found, key=lambda event: (event.step, math.inf if math.isnan(event.time) else event.time))


def shortened(events: Sequence[Event]) -> tuple[list[Event], int]:
    """Return the first and the last events, and how many are left out between them."""
    left_out = max(0, len(events) - FEW - LAST)
    return [*events[:FEW], *events[FEW + left_out :]], left_out


def _starts(run: RunRecords) -> Iterator[Event]:
    before = ""
    for record in run.starts:
        step, ranks = int(record["step"]), number_of(record, "world_size")
        said = "" if ranks is None else counted(int(ranks), "rank")
        if isinstance(device := record.get("device"), str):
            said += f", {device}" if said else device
        if (code := code_of(record)) != before:  # of older records it is not known
            said += f"; {code or NOT_RECORDED}"
            before = code
        yield Event(_time(record), step, "resume" if step else "start", said)


def _stops(run: RunRecords) -> Iterator[Event]:
    for record in run.stops:
        yield Event(_time(record), int(record["step"]), "stop", f"asked for by {record.get('reason', 'nobody known')}")


def _evaluations(run: RunRecords) -> Iterator[Event]:
    for record in run.evaluations:
        numbers = numbers_of_models(record)
        parts = []
        for key, title in HEADLINES.items():
            shares = [f"{model} {100 * numbers[model][key]:.1f} %" for model in MODELS if key in numbers.get(model, {})]
            if shares:
                parts.append(f"{title}: {', '.join(shares)}")
        said = f"{evaluator_of(record)}: {'; '.join(parts)}" if parts else evaluator_of(record)
        yield Event(_time(record), int(record["step"]), "evaluation", said)
    for record in run.failures:
        yield Event(_time(record), int(record["step"]), "evaluation failed", evaluator_of(record))


def _checkpoints(run: RunRecords) -> Iterator[Event]:
    for one in run.saved:
        said = f"{one.folder.name}, {counted(one.world_size, 'rank')}"
        if one.lost_shards:
            said += f", {counted(one.lost_shards, 'shard')} lost"
        yield Event(one.written, one.step, "checkpoint", said)


def _skipped(run: RunRecords) -> Iterator[Event]:
    steps = set(skipped_steps(run))
    for record in run.train:
        if record["step"] in steps:
            loss = "a loss or gradient that is not finite"
            total = int(number_of(record, "skipped_steps") or 0)
            said = f"{loss}; skipped so far: {total}" if total else loss
            yield Event(_time(record), int(record["step"]), "skipped step", said)


def _damage(run: RunRecords) -> Iterator[Event]:
    for record in run.damages:
        if record.get("sample") is None:
            said = f"{record.get('shard', 'a shard')}: {record['reason']}"
            yield Event(math.nan, int(record["step"]), "lost shard", said)
    damaged = [record for record in run.damages if record.get("sample") is not None]
    for step, times in sorted(Counter(int(record["step"]) for record in damaged).items()):
        reasons = Counter(record["reason"] for record in damaged if record["step"] == step)
        said = f"{counted(times, 'sample')} replaced: {', '.join(reasons)}"
        yield Event(math.nan, step, "damaged samples", said)


def _pauses(run: RunRecords) -> Iterator[Event]:
    """Long times without a step, of a run whose records do not say when it was started anew."""
    for before, after in pairwise(run.train):
        seconds = number_of(after, "step_seconds_max") or 0.0
        gap = _time(after) - _time(before) - (after["step"] - before["step"]) * seconds
        if gap > max(LONG_PAUSE, PAUSE_STEPS * seconds):
            said = f"{gap / 60:,.1f} minutes between two records that no step took: a restart, or an evaluation"
            yield Event(_time(before), int(before["step"]), "pause", said)


def _time(record: Record) -> float:
    time = number_of(record, "time")
    return math.nan if time is None else time
