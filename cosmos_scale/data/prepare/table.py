"""The join table: where in the captions files the row of a join value lies, on disk and sorted by hash.

A row takes 26 bytes: a 64-bit hash of the value, then offset, size, row number and file. The top bits of the hash send
a row to one of 64 files. Each file is sorted on its own, so that memory stays bounded at any number of rows. The sorted
files, one after the other, are one sorted table, which look-ups map into memory.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from cosmos_scale.data.jobs import progress_bar
from cosmos_scale.data.prepare.datasets import Dataset, Join, join_value
from cosmos_scale.data.prepare.rows import PlacedRow, RowFile, scan_captions
from cosmos_scale.data.prepare.work import reading_work
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.errors import UserError
from cosmos_scale.files import NO_ROOM, load_json, make_folder, read_regular, reason_of, regular_only, replace_file
from cosmos_scale.words import counted

PLACE = np.dtype([("offset", "<i8"), ("size", "<u4"), ("row", "<u4"), ("file", "<u2")])
RECORD = np.dtype([("hash", "<u8"), *((name, PLACE[name]) for name in PLACE.names or ())])
BUCKET_BITS = 6
_CHUNK = 1 << 15  # rows that are held as Python objects
MISSING = -1


class TableSummary(NamedTuple):
    """What the table was made of. rows: all rows read; examples: a few join values."""

    files: list[RowFile]
    rows: int
    examples: list[str]


class JoinTable:
    """The table on disk; positions in it stand for rows of captions."""

    def __init__(self, folder: Path) -> None:
        self.hashes: NDArray[np.uint64] = _mapped(folder / "hashes.bin", np.dtype("<u8"))
        self.places: NDArray[np.void] = _mapped(folder / "places.bin", PLACE)
        if len(self.hashes) != len(self.places):
            with reading_work(folder / "places.bin"):
                raise ValueError(f"it has {counted(len(self.places), 'row')}, hashes.bin {len(self.hashes)}")

    def __len__(self) -> int:
        return len(self.hashes)

    def find(self, values: Sequence[str]) -> NDArray[np.int64]:
        """Return the position of each join value, MISSING for a value without row.

        Values with equal hashes are not told apart here: the reader of the row compares the values.
        """
        wanted = np.array([join_hash(value) for value in values], dtype=np.uint64)
        positions = np.searchsorted(self.hashes, wanted).astype(np.int64)
        found = self.hashes[np.minimum(positions, len(self.hashes) - 1)] == wanted
        return np.where(found & (positions < len(self.hashes)), positions, MISSING)


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    with reading_work(path), open(path, "rb", opener=regular_only) as file:  # to map a FIFO would wait for ever
        return np.memmap(file, dtype=dtype, mode="r")


def join_hash(value: str) -> int:
    """Return a 64-bit hash of a join value that is the same in every process."""
    return int.from_bytes(blake2b(value.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def build_table(folder: Path, captions: Sequence[Path], dataset: Dataset, join: Join, *, progress: bool) -> None:
    """Read all captions files once and write the table; a whole table from before is kept.

    Rows that cannot be used or whose value came before are written to `rows.jsonl`, with the reason.
    Raises: UserError where a file cannot be used, or has no row to join.
    """
    summary = folder / "table.json"
    if summary.exists():
        return
    make_folder(folder)
    builder = _Builder(folder, captions, dataset, join)
    total = sum(path.stat().st_size for path in captions)
    with progress_bar("reading captions (bytes)", total, show=progress) as advance, _full_disk_named(folder):
        builder.read(_in_steps(advance, total))
    if builder.usable == 0:
        first = builder.first_fault or "there is none"
        raise UserError(f"{captions[0]}: none of {counted(builder.rows, 'row')} can be used; the first: {first}")
    with _full_disk_named(folder):
        builder.sort()
    content = {
        "files": [[os.path.abspath(file.path), *file[1:]] for file in builder.files],
        "rows": builder.rows,
        "examples": builder.examples,
    }
    replace_file(summary, json.dumps(content).encode())


@contextmanager
def _full_disk_named(folder: Path) -> Iterator[None]:
    """Name the folder where its disk is full: what writes a part of a file does not know the file's name."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(f"{folder}: cannot be written: {reason_of(error)}") from error


def read_table_summary(folder: Path) -> TableSummary:
    """Return the summary of a whole table."""
    path = folder / "table.json"
    with reading_work(path):
        content = load_json(read_regular(path))
        files = [RowFile(Path(path), *others) for path, *others in content["files"]]
        return TableSummary(files, content["rows"], content["examples"])


def _in_steps(advance: Callable[[int], None], total: int) -> Callable[[int], None]:
    """Gather small advances: to draw the bar for each row would take longer than to read the row."""
    waiting = 0

    def advance_later(steps: int) -> None:
        nonlocal waiting
        waiting += steps
        if waiting * 200 > total:
            advance(waiting)
            waiting = 0

    return advance_later


class _Builder:
    def __init__(self, folder: Path, captions: Sequence[Path], dataset: Dataset, join: Join) -> None:
        self.files: list[RowFile] = []
        self.rows = self.usable = 0
        self.examples: list[str] = []
        self.first_fault: str | None = None
        self._folder = folder
        self._captions = captions
        self._dataset = dataset
        self._join = join

    def read(self, advance: Callable[[int], None]) -> None:
        """Scatter all rows over the buckets."""
        with ExitStack() as stack:
            buckets = [
                stack.enter_context(open(self._bucket(bits), "wb", opener=regular_only))
                for bits in range(1 << BUCKET_BITS)
            ]
            faults = stack.enter_context(open(self._folder / "rows.jsonl", "w", opener=regular_only))
            for number, path in enumerate(self._captions):
                copy = self._folder / f"captions-{number:05d}.jsonl"
                file, rows = scan_captions(path, copy, self._dataset, self._join, advance)
                self.files.append(file)
                usable = self._usable(number, path, rows, faults)
                while chunk := list(islice(usable, _CHUNK)):
                    records = np.array(chunk, dtype=RECORD)
                    bits = (records["hash"] >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)
                    order = np.argsort(bits, kind="stable")
                    ends = np.searchsorted(bits[order], np.arange(1, 1 << BUCKET_BITS))
                    for bucket, part in zip(buckets, np.split(records[order], ends), strict=True):
                        bucket.write(part.tobytes())

    def _usable(
        self, number: int, path: Path, rows: Iterator[PlacedRow], faults: TextIO
    ) -> Iterator[tuple[int, int, int, int, int]]:
        for row in rows:
            self.rows += 1
            fault = row.fault
            if fault is None:
                try:
                    value = join_value(self._join, row.value)
                    self._check_url(path, row, value)
                    fault = None if value else f"no {self._join}"
                except DamagedSample as damage:
                    fault = str(damage)
            if fault is not None:
                self.first_fault = self.first_fault or fault
                reason = f"captions row cannot be read: {fault}"
                faults.write(json.dumps({"captions": path.name, "row": row.number, "reason": reason}) + "\n")
                continue
            self.usable += 1
            if len(self.examples) < 2:
                self.examples.append(value)
            yield join_hash(value), row.offset, row.size, row.number, number

    def _check_url(self, path: Path, row: PlacedRow, value: str) -> None:
        if self.usable == 0 and self._join == "url" and value and "://" not in value:
            raise UserError(
                f"{path}: row {row.number} names its image {value}, which is no URL; take the release with URLs, or "
                "--join key if img2dataset's keys are meant"
            )

    def sort(self) -> None:
        """Sort the buckets into the table; of rows with the same value the first stays."""
        with (
            open(self._folder / "hashes.bin", "wb", opener=regular_only) as hashes,
            open(self._folder / "places.bin", "wb", opener=regular_only) as places,
            open(self._folder / "rows.jsonl", "a", opener=regular_only) as faults,
        ):
            for bits in range(1 << BUCKET_BITS):
                records = np.frombuffer(read_regular(self._bucket(bits)), dtype=RECORD)
                records = records[np.argsort(records["hash"], kind="stable")]
                first = np.ones(len(records), dtype=bool)
                first[1:] = records["hash"][1:] != records["hash"][:-1]
                hashes.write(records["hash"][first].tobytes())
                kept = np.empty(int(first.sum()), dtype=PLACE)
                for name in PLACE.names or ():
                    kept[name] = records[name][first]
                places.write(kept.tobytes())
                for record in records[~first]:
                    line = {"captions": self._captions[record["file"]].name, "row": int(record["row"])}
                    faults.write(
                        json.dumps({**line, "reason": f"duplicate captions row: its {self._join} came before"})
                    )
                    faults.write("\n")
                self._bucket(bits).unlink()

    def _bucket(self, bits: int) -> Path:
        return self._folder / f"bucket-{bits:02d}.bin"
