"""What a preparation made: counts, bytes, rejects by reason, options, versions, and a line per shard."""

import json
import platform
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

import cosmos_scale
from cosmos_scale.data.prepare import parquet
from cosmos_scale.data.prepare.matching import MISSPELT, UNSEEN, read_states
from cosmos_scale.data.prepare.table import JoinTable, read_table_summary
from cosmos_scale.data.prepare.work import Task, reading_work
from cosmos_scale.data.prepare.writing import read_report
from cosmos_scale.data.samples.normal_forms import OTHER_FORM
from cosmos_scale.data.samples.sample import reason_class
from cosmos_scale.data.shards.checksums import ShardSum, write_shard_sums
from cosmos_scale.data.shards.index_report import REJECTED
from cosmos_scale.data.work import MANIFEST, check_options
from cosmos_scale.errors import UserError
from cosmos_scale.files import load_json, read_regular, regular_only, whole_file, writing
from cosmos_scale.words import counted

FORMAT = "cosmos-scale prepared dataset 1"
_CHUNK = 1 << 16  # table rows looked at together


class Prepared(NamedTuple):
    """A finished preparation, from its manifest."""

    folder: Path
    samples: int
    shards: int
    size: int
    rows: int
    rejected: dict[str, int]

    def describe(self) -> str:
        """Return the report as lines for a terminal."""
        lines = [
            f"{counted(self.samples, 'sample')}, {counted(self.size, 'byte')}, in "
            f"{counted(self.shards, 'indexed shard')} in {self.folder}",
            f"from {counted(self.rows, 'row')} of captions",
        ]
        lines += [f"{count:,} rejected: {reason}" for reason, count in self.rejected.items()]
        if self.rejected:
            lines.append(f"each is named in {self.folder / REJECTED}")
        return "\n".join(lines)


def read_prepare_manifest(task: Task, asked: dict[str, Any]) -> Prepared | None:
    """Return what a finished preparation made; None where no preparation is finished. asked: the task's options.

    Raises: UserError where the preparation was made with other options, or one of its shards is gone or cut since.
    """
    path = task.out / MANIFEST
    if not path.exists():
        return None
    try:
        content = load_json(read_regular(path))
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']!r}")
        options: dict[str, Any] = content["options"]
        prepared = Prepared(
            task.out,
            content["samples"],
            len(content["shards"]),
            content["bytes"],
            content["captions_rows"],
            content["rejected"],
        )
        sizes = {str(shard["shard"]): int(shard["bytes"]) for shard in content["shards"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a manifest of `data prepare` ({error}); name another folder with --out"
        ) from error
    check_options(task.as_work, asked, options, "done")
    changed = [name for name, size in sizes.items() if _size(task.out / name) != size]
    if changed:
        raise UserError(
            f"{task.out}: its preparation was done, but since then {counted(len(changed), 'shard')} of {len(sizes)} "
            f"went missing or changed size, first {changed[0]}; rule: copy them back, or name another folder with --out"
        )
    return prepared


def _size(path: Path) -> int | None:
    """Return a file's bytes, None where it is not there; raises UserError where that cannot be told."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be looked at: {error.strerror}") from error


def write_rejected(task: Task) -> Counter[str]:
    """Write what every shard rejected, and the rows of captions without image; returns counts by reason."""
    counts: Counter[str] = Counter()
    path = task.out / REJECTED
    with writing(path), whole_file(path) as part, open(part, "w", opener=regular_only) as file:
        for shard in task.images:
            report = read_report(task, shard.name)
            _write(file, [] if report is None else report.rejected, counts)
        with reading_work(task.table / "rows.jsonl"), open(task.table / "rows.jsonl", opener=regular_only) as rows:
            _write(file, map(json.loads, rows), counts)
        _write(file, _rows_without_image(task), counts)
    return counts


def write_prepare_manifest(task: Task, options: dict[str, Any], rejected: Counter[str]) -> None:
    """Write the manifest, which says that the preparation is done."""
    reports = [report for shard in task.images if (report := read_report(task, shard.name)) and report.samples]
    content = {
        "format": FORMAT,
        "options": options,
        "versions": {
            "cosmos-scale": cosmos_scale.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pyarrow": parquet.version(),
        },
        "captions_rows": read_table_summary(task.table).rows,
        "samples": sum(report.samples for report in reports),
        "bytes": sum(report.size for report in reports),
        "rejected": dict(sorted(rejected.items(), key=lambda item: (-item[1], item[0]))),
    }
    sums = (ShardSum(f"{report.shard}.tar", report.samples, report.size, report.sha256) for report in reports)
    write_shard_sums(task.out / MANIFEST, content, sums)


def _write(file: TextIO, rejects: Any, counts: Counter[str]) -> None:
    for reject in rejects:
        counts[reason_class(reject["reason"])] += 1
        file.write(json.dumps(reject) + "\n")


def _rows_without_image(task: Task) -> Iterator[dict[str, Any]]:
    """Yield the table's rows that no listing has, by reason and in the order of their files."""
    table = JoinTable(task.table)
    state = read_states(task, len(table))
    names = [path.name for path in task.captions]
    reason = f"no image: no shard lists its {task.join}"
    for kind, said in ((UNSEEN, reason), (MISSPELT, f"{reason}, but {OTHER_FORM} is listed")):
        without = np.concatenate(
            [
                table.places[start : start + _CHUNK][["file", "row"]][state[start : start + _CHUNK] == kind]
                for start in range(0, len(table), _CHUNK)
            ]
        )
        for place in without[np.lexsort((without["row"], without["file"]))]:
            yield {"captions": names[place["file"]], "row": int(place["row"]), "reason": said}
