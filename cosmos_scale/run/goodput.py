"""Goodput: the share of the time since a run's first start in which it took steps that counted.

The rest is start-up, compilation outside of steps, evaluations, checkpoints, steps that were lost with a launch and
taken again, steps whose update was skipped, and the time between launches.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_scale.files import load_json, read_regular
from cosmos_scale.host import process_seconds

_SECONDS = {"train": "step_seconds_max", "stop": "useful_seconds"}  # what a kind of record must have
_OPTIONAL = {"useful_seconds", "wall_seconds"}  # older versions did not write these
_MOST = 1e12  # no clock shows so many seconds, and no run lasts so long


class Goodput:
    """Counts useful seconds over all launches of a run; it reads what earlier launches had from their records."""

    def __init__(self, records: Path, first_step: int, *, anew: bool) -> None:
        """records: the run's metrics.jsonl with all records, those of steps that are taken again too.

        first_step: steps done before this launch. anew: whether it begins another run, to which no record belongs.
        """
        found = [] if anew else _records(records)
        self._useful = _useful_seconds(found, first_step)
        # The clock may have been set back since: then at least what the records tell.
        between = time.time() - process_seconds() - _first_start(found)
        self._before = max(between, _recorded_seconds(found), self._useful)

    def add(self, seconds: float) -> None:
        """Note seconds of steps that counted."""
        self._useful += seconds

    def numbers(self) -> dict[str, float]:
        """Return the seconds of useful steps, those since the run's first start, and their ratio."""
        wall = self._before + process_seconds()  # not by the clock, which may be set while the run goes on
        return {"useful_seconds": self._useful, "wall_seconds": wall, "goodput": self._useful / wall}


def _records(path: Path) -> list[dict[str, Any]]:
    """Return the records of training and of stops with their useful seconds in a file, those that are whole."""
    try:
        lines = read_regular(path).splitlines()
    except OSError:  # none yet; what else is wrong with the file is said where it is opened to be written
        return []
    found = []
    for line in lines:
        try:
            record = load_json(line)
            needed = ("step", "time", _SECONDS[record["kind"]])
            if all(_is_count(record[key]) for key in (*needed, *(_OPTIONAL & record.keys()))):
                found.append(record)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _is_count(value: object) -> bool:
    """Whether a value can be counted with: other programs that write the file again may leave null, text, or more."""
    return isinstance(value, int | float) and 0 <= value <= _MOST


def _first_start(records: list[dict[str, Any]]) -> float:
    """Return when the run began, in seconds since 1970, as the newest record's clock has it; now where it begins.

    For records of older versions: before its first record.
    """
    for record in reversed(records):
        if "wall_seconds" in record:
            return float(record["time"] - record["wall_seconds"])
    for record in records:
        return float(record["time"] - record["step"] * record["step_seconds_max"])
    return time.time() - process_seconds()


def _recorded_seconds(records: list[dict[str, Any]]) -> float:
    """Return the seconds from the run's first start to its last record, as that record has them; else 0."""
    return max((float(record.get("wall_seconds", 0.0)) for record in records), default=0.0)


def _useful_seconds(records: list[dict[str, Any]], step: int) -> float:
    """Return the useful seconds of the first steps; between two records as the later one has it a step."""
    steps, seconds = [0.0], [0.0]
    for record in records:
        if record["step"] > steps[-1]:
            if "useful_seconds" in record:
                seconds.append(record["useful_seconds"])
            else:
                seconds.append(seconds[-1] + (record["step"] - steps[-1]) * record["step_seconds_max"])
            steps.append(record["step"])
    if step > steps[-1] and len(steps) > 1:  # saved behind the last record
        slope = (seconds[-1] - seconds[-2]) / (steps[-1] - steps[-2])
        return seconds[-1] + slope * (step - steps[-1])
    return float(np.interp(step, steps, seconds))
