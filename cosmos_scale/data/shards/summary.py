"""An index's summary, `index.json`: how many samples each shard has, how long it is, and its mark."""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.config import RemoteConfig
from cosmos_scale.data.shards.store import Transient, redact
from cosmos_scale.data.shards.table import read_whole
from cosmos_scale.errors import UserError
from cosmos_scale.files import load_json, read_regular, replace_file
from cosmos_scale.words import counted

SUMMARY = "index.json"
FORMAT = "cosmos-scale shard index 1"
_MOST = 1 << 53  # of samples, and of bytes, of one shard
# What reading a broken summary raises.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError)


class ShardRow(NamedTuple):
    """One shard's line of the summary: its name relative to the pattern's root, its samples, its size in bytes."""

    name: str
    samples: int
    size: int


class Summary(NamedTuple):
    """An index's summary: a row for each shard, in the order that sample ids follow.

    marks: by the shards' names, see mark.py; an index that was made before there were marks has none.
    """

    rows: list[ShardRow]
    marks: Mapping[str, str]


def read_index_summary(path: str, remote: RemoteConfig | None = None) -> Summary:
    """Read an index's summary; path: may be a URL.

    remote: how often to try again where a file system fails; None: not at all, and at a URL as usual.
    Raises: UserError where it is unreadable or of another format.
    """
    try:
        return _parse_summary(read_whole(path, remote))
    except Transient as failure:
        raise UserError(f"{redact(path)}: index cannot be read: {failure}") from failure
    except PermissionError as error:
        raise UserError(f"{redact(path)}: index cannot be read: {error.strerror}") from error
    except _UNREADABLE as error:
        raise UserError(f"{redact(path)}: not a shard index ({error}); run `cosmos-scale data index` again") from error


def _parse_summary(data: bytes) -> Summary:
    summary = load_json(data)
    if summary["format"] != FORMAT:
        raise ValueError(f"format is {summary['format']!r}, expected {FORMAT!r}")
    rows = [ShardRow(str(name), int(samples), int(size)) for name, samples, size in summary["shards"]]
    for row in rows:
        if min(row.samples, row.size) < 0 or row.samples > _MOST or row.size > _MOST:
            raise ValueError(f"{row.name}: {counted(row.samples, 'sample')} in {row.size} bytes cannot be")
    if len({row.name for row in rows}) < len(rows):
        raise ValueError("a shard stands twice in it, whose samples would count twice")
    marks = {str(name): str(mark) for name, mark in summary.get("marks", {}).items()}
    return Summary(rows, marks)


def lacks_summary(path: str) -> bool:
    """Return whether there is no summary at a path; False where the path is closed to the user: reading says so."""
    try:
        os.lstat(path)
    except OSError as error:
        return not isinstance(error, PermissionError)
    return False


def write_index_summary(path: Path, summary: Summary) -> None:
    """Write an index's summary, whole or not at all."""
    # One line a shard: a million-sample index stays readable, and comparable with diff.
    lines = ",\n".join(json.dumps(row) for row in summary.rows)
    marks = ",\n".join(f"{json.dumps(name)}: {json.dumps(mark)}" for name, mark in sorted(summary.marks.items()))
    start = f'{{"format": {json.dumps(FORMAT)}, "shards"'
    replace_file(path, f'{start}: [\n{lines}\n], "marks": {{\n{marks}\n}}}}\n'.encode())


def alike_shards(rows: Iterable[ShardRow], marks: Mapping[str, str]) -> list[tuple[str, str]]:
    """Pair each shard with an earlier one of its size and mark: links and copies, whose samples count twice."""
    first: dict[tuple[int, str], str] = {}
    names = [(row.name, first.setdefault((row.size, marks[row.name]), row.name)) for row in rows if row.samples]
    return [(name, like) for name, like in names if name != like]


def summary_before(folder: Path) -> Summary:
    """The summary of an existing index; an empty one where there is none, or it is unreadable.

    Raises: UserError where an index.json of another program lies there.
    """
    path = folder / SUMMARY
    refuse_foreign_summary(path)
    if path.exists():
        try:
            return _parse_summary(read_regular(path))
        except _UNREADABLE as error:  # to index again mends the file, and that is being done
            print(f"{path}: not a shard index ({error}); what it said of other shards is dropped", file=sys.stderr)
    return Summary([], {})


def refuse_foreign_summary(path: Path) -> None:
    """Raise UserError where a file is sound json of another program, such as wids: it must not be replaced."""
    try:
        found = load_json(read_regular(path))
    except (OSError, ValueError):
        return
    kind = found.get("format") if isinstance(found, dict) else None
    if not str(kind).startswith(FORMAT.rpartition(" ")[0]):
        raise UserError(f"{path}: is the file of another program; move it away, or name another folder with --out")
