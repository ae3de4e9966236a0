"""What a run's metrics.jsonl holds: read back, and cut where a resumed run takes steps again."""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_scale.errors import UserError
from cosmos_scale.files import load_json, read_regular, replace_file
from cosmos_scale.run.folder import METRICS_FILE, evaluation_folder
from cosmos_scale.run.tracker_entries import TrackerEntry, named_pictures

_RECORD = b'{"kind": "'  # what each record begins with
_BLANK = b"\0 \t\r\n"  # zeros are left where the power failed

TRACKED_KINDS = ("train", "eval", "eval_failed")
"""Kinds of records that trackers get, too."""


def evaluations_at(path: Path, step: int) -> dict[str, dict[str, float | None]]:
    """Return what each evaluator measured at a step, {model/metric: number}; None where a number was not finite.

    path: a run's METRICS_FILE. Empty where it cannot be read or has no such records.
    """
    found = {}
    for entry in records_of(path):
        if entry.get("kind") == "eval" and entry.get("step") == step:
            found[evaluator_of(entry)] = {key: value for key, value in entry.items() if "/" in key}
    return found


def records_of(path: Path) -> list[dict[str, Any]]:
    """Return the records of a METRICS_FILE, without lines that are none; none where it cannot be read."""
    found = []
    try:
        for line in read_regular(path).splitlines():
            with suppress(ValueError):
                found.append(load_json(line))
    except OSError:
        return []
    return [entry for entry in found if isinstance(entry, dict)]  # a damaged line may be a number


def evaluator_of(entry: Mapping[str, object]) -> str:
    """Return whose record of an evaluation it is.

    Older records do not say it; without a name before its numbers such a record is retrieval's.
    """
    first = next((key.partition("/")[0] for key in entry if "/" in key), "")
    return str(entry.get("evaluator", "retrieval" if first in ("student", "teacher") else first))


def tracked_entries(folder: Path) -> Iterator[TrackerEntry]:
    """Yield what trackers were given of the records in a run's METRICS_FILE, in the order of the file.

    folder: the run's. A number that was not finite is nan. Pictures are those that still lie in the folder.
    """
    for record in records_of(folder / METRICS_FILE):
        kind, step = record.get("kind"), record.get("step")
        if kind not in TRACKED_KINDS or not isinstance(step, int):
            continue
        numbers = {
            key: math.nan if value is None else value
            for key, value in record.items()
            if key not in ("step", "time") and (value is None or isinstance(value, int | float))
        }
        named = {f"{kind}/{key}": value for key, value in numbers.items()}
        logged_at = record.get("time")
        time = logged_at if isinstance(logged_at, int | float) else math.nan
        if kind != "eval" or not numbers:
            yield TrackerEntry(step, time, named, {}, {})
            continue
        name = evaluator_of(record)
        prefix = f"{name}/" if all(key.startswith(f"{name}/") for key in numbers) else ""
        results: dict[str, dict[str, float]] = {}
        for key, value in numbers.items():
            model, _, metric = key.removeprefix(prefix).partition("/")
            results.setdefault(model, {})[metric] = value
        folders = {f"{prefix}{model}": evaluation_folder(folder, name, step, model) for model in results}
        table = {f"{prefix}{model}": numbers for model, numbers in results.items()}
        yield TrackerEntry(step, time, named, {f"eval/{name}/table": table}, named_pictures(folders))


class Cut(NamedTuple):
    """What is taken out of a file of records: `lines` lines, among them `tracked` records that trackers have too.

    foreign: further lines that are no records, such as a user's notes.
    """

    path: Path
    before: bytes
    after: bytes
    lines: int
    tracked: int
    foreign: int = 0

    def make(self) -> Path | None:
        """Replace the file, whole or not at all; raises UserError where it cannot be written.

        Where foreign lines are taken out, the file of before is kept beside it; returns that copy.
        """
        copy = None
        if self.foreign:
            names = (self.path.with_name(f"{self.path.name}.old{'' if n == 1 else f'-{n}'}") for n in count(1))
            copy = next(name for name in names if not name.exists())
            replace_file(copy, self.before)
        if self.after != self.before:  # where nothing is to be dropped, a full disk does no harm
            # A link stays one: the file that it names keeps the run's records.
            replace_file(self.path.resolve(), self.after)
        return copy


def cut_after(path: Path, step: int) -> Cut:
    """Find a file's records of steps after `step`, all of them where it is 0, a torn last line, and foreign lines.

    Nothing is changed yet. Raises UserError where the file cannot be read.
    """
    if not path.exists():
        return Cut(path, b"", b"", 0, 0)
    try:
        before = read_regular(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    kept, tracked, dropped, foreign = [], 0, 0, 0
    for line in before.splitlines(keepends=True):
        record: Any = None
        try:
            record = load_json(line)
            if record["step"] <= step > 0:
                kept.append(line.rstrip(b"\r\n") + b"\n")
            else:
                tracked += record["kind"] in TRACKED_KINDS
                dropped += 1
        except (ValueError, KeyError, TypeError):
            if record is None and _is_torn(line):
                dropped += 1
            else:
                foreign += line.strip(_BLANK) != b""
    return Cut(path, before, b"".join(kept), dropped, tracked, foreign)


def _is_torn(line: bytes) -> bool:
    """Whether a line is the begin of a record, of a run that was killed while it wrote: it has no end.

    A last line without an end may be anything else, such as all records as one list, which other programs write so.
    """
    begin = line.strip(_BLANK)[: len(_RECORD)]
    return not line.endswith((b"\r", b"\n")) and begin != b"" and _RECORD.startswith(begin)
