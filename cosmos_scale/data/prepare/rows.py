"""The rows of caption files, each with its place, so that a row can be read again without the rows before it.

A row of a CSV file is read again from the file itself: the place is the row's bytes. A row of a parquet file has no
address, so the needed columns are copied into a file of json lines, one row a line.
"""

import csv
import json
import os
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from cosmos_scale.data.prepare import parquet
from cosmos_scale.data.prepare.cells import read_cell
from cosmos_scale.data.prepare.csv_records import (
    CELL_LIMIT,
    named_separator,
    read_header,
    read_records,
    refuse_columns_twice,
)
from cosmos_scale.data.prepare.datasets import Dataset, Join
from cosmos_scale.data.samples.caption_keys import plain_column
from cosmos_scale.data.samples.document import encode_document
from cosmos_scale.data.samples.file_kind import no_text, refuse_no_text
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.errors import UserError
from cosmos_scale.files import regular_only

BOM = b"\xef\xbb\xbf"


class RowFile(NamedTuple):
    """A file whose rows can be read by place.

    columns: the plain names, None for columns that are left out. delimiter: what separates the cells of a CSV row.
    """

    path: Path
    kind: Literal["csv", "json"]
    columns: list[str | None]
    delimiter: str = ","  # noted last: tables of older versions lack it

    def cells(self, data: bytes, joins: Container[str] = ()) -> dict[str, Any]:
        """Return a row's cells by plain column name. joins: columns of the join value, whose cells stay text."""
        if self.kind == "csv":
            record = next(csv.reader([data.decode()], delimiter=self.delimiter))
            cells: Iterable[tuple[str | None, Any]] = zip(self.columns, record, strict=True)
        else:
            cells = zip(self.columns, json.loads(data), strict=True)
        return {name: cell if name in joins else read_cell(name, cell) for name, cell in cells if name is not None}


class PlacedRow(NamedTuple):
    """One row of a captions file, found by its place.

    number: from 1, header left out. offset, size: the row's bytes. value: its join value. fault: what is wrong with the
    row, if anything is.
    """

    number: int
    offset: int
    size: int
    value: str
    fault: str | None


def caption_files(paths: list[Path]) -> list[Path]:
    """List the .csv and .parquet files that paths mean: files, or folders of them; raises UserError for other paths."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = (file for file in path.iterdir() if not file.name.startswith("."))
            found = sorted(file for file in inside if file.suffix.lower() in (".csv", ".parquet"))
            if not found:
                raise UserError(f"{path}: holds no .csv or .parquet file of captions")
            files += found
        elif not path.is_file():
            raise UserError(f"{path.absolute()}: no such captions file or folder")
        elif path.suffix.lower() not in (".csv", ".parquet"):
            said = ""
            with suppress(OSError):
                said = no_text(path)
            raise UserError(f"{path}: captions come as .csv or .parquet{f'; it {said}' if said else ''}")
        else:
            files.append(path)
    return files


def join_column(path: Path, header: list[str], dataset: Dataset, join: Join) -> str:
    """Return the plain name of the column that joins a file's rows with images.

    Raises: UserError where the header lacks it or every column of captions, or has one of these twice.
    """
    names = {plain_column(name) for name in header}
    shown = ", ".join(header) or "nothing"
    wanted = dataset.joins[join]
    column = next((name for name in wanted if name in names), None)
    if column is None:
        raise UserError(f"{path}: no column for --join {join}: one of {', '.join(wanted)} is needed, it has {shown}")
    if names.isdisjoint(dataset.captions):
        wanted = tuple(dataset.captions)
        raise UserError(f"{path}: no column of captions: one of {', '.join(wanted)} is needed, it has {shown}")
    refuse_columns_twice(path, header, {column, *dataset.captions})
    return column


def check_header(path: Path, dataset: Dataset, join: Join) -> None:
    """Raise UserError where a captions file cannot be used, as far as its header tells."""
    scan_captions(path, Path(os.devnull), dataset, join, lambda _: None)  # the rows are read when asked for


def scan_captions(
    path: Path, copy: Path, dataset: Dataset, join: Join, advance: Callable[[int], None]
) -> tuple[RowFile, Iterator[PlacedRow]]:
    """Return a captions file as a file that is read by place, and the file's rows in order.

    copy: the file that a parquet file's rows are copied to. advance: is told of bytes as they are read.
    Raises: UserError where the file cannot be used.
    """
    if path.suffix.lower() == ".parquet":
        return _scan_parquet(path, copy, dataset, join, advance)
    return _scan_csv(path, dataset, join, advance)


def _scan_csv(
    path: Path, dataset: Dataset, join: Join, advance: Callable[[int], None]
) -> tuple[RowFile, Iterator[PlacedRow]]:
    try:
        refuse_no_text(path)
        with open(path, "rb", opener=regular_only) as file:
            delimiter = named_separator(next(_Lines(file), ""))
            file.seek(0)
            header = read_header(path, read_records(_Lines(file)))
    except OSError as error:
        raise UserError(f"{path}: its header cannot be read: {error}") from error
    column = join_column(path, header, dataset, join)
    names = [plain_column(name) for name in header]
    kept: list[str | None] = [name if name == column or name in dataset.captions else None for name in names]
    return RowFile(path, "csv", kept, delimiter or ","), _csv_rows(path, names.index(column), advance)


def _csv_rows(path: Path, position: int, advance: Callable[[int], None]) -> Iterator[PlacedRow]:
    with open(path, "rb", opener=regular_only) as file:
        lines = _Lines(file)
        number, offset = -1, 0
        for record in read_records(lines):
            taken = [lines.unplaced.popleft() for _ in range(record.lines)]
            start, size = offset, sum(line.size for line in taken)
            offset += size
            advance(size)
            if not record.cells and record.fault is None:
                continue
            number += 1
            if number == 0:
                continue
            foreign = next((line.foreign for line in taken if line.foreign is not None), None)
            fault = record.fault
            if foreign is not None:
                fault = f"not UTF-8: byte 0x{foreign:02x}; save the file as UTF-8"
            yield PlacedRow(number, start, size, "" if fault else record.cells[position], fault)


class _Line(NamedTuple):
    """The bytes of a line, and a byte among them that is not UTF-8, if there is such a byte."""

    size: int
    foreign: int | None


class _Lines:
    """The lines of a file as text. unplaced: of each line that was read and belongs to no row yet, its bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self.unplaced: deque[_Line] = deque()
        self._file = file
        self._first = True

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._file)
        size = len(line)
        line = line.removeprefix(BOM) if self._first else line
        self._first = False
        try:
            text, foreign = line.decode(), None
        except UnicodeDecodeError as error:
            # The row cannot be used, but its end must still be found.
            text, foreign = line.decode("utf-8", "replace"), line[error.start]
        self.unplaced.append(_Line(size, foreign))
        return text


def _scan_parquet(
    path: Path, copy: Path, dataset: Dataset, join: Join, advance: Callable[[int], None]
) -> tuple[RowFile, Iterator[PlacedRow]]:
    header = parquet.column_names(path)
    column = join_column(path, header, dataset, join)
    chosen = [name for name in header if plain_column(name) == column or plain_column(name) in dataset.captions]
    names: list[str | None] = [plain_column(name) for name in chosen]
    return RowFile(copy, "json", names), _parquet_rows(path, copy, chosen, names.index(column), advance)


def _parquet_rows(
    path: Path, copy: Path, columns: list[str], position: int, advance: Callable[[int], None]
) -> Iterator[PlacedRow]:
    rows, size = max(parquet.count_rows(path), 1), path.stat().st_size
    number = offset = 0
    with open(copy, "wb", opener=regular_only) as file:
        for batch in parquet.read_columns(path, columns):
            for values in zip(*batch, strict=True):
                number += 1
                try:
                    cells = [_plain(value, column) for value, column in zip(values, columns, strict=True)]
                    line, fault = encode_document(cells) + b"\n", None
                except DamagedSample as damage:
                    cells, line, fault = [None] * len(values), b"", str(damage)
                file.write(line)
                value = cells[position]
                if fault is None and not isinstance(value, str):
                    fault = f"wrong type: its {columns[position]} is no text"
                yield PlacedRow(number, offset, len(line), value if isinstance(value, str) else "", fault)
                offset += len(line)
            advance(len(batch[0]) * size // rows)


def _plain(value: Any, column: str) -> Any:
    """Return a value of a parquet file as a value of json: bytes are text. Raises DamagedSample for other types."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise DamagedSample(f"not UTF-8: byte 0x{value[error.start]:02x} in {column}") from error
    if isinstance(value, list):
        return [_plain(item, column) for item in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise DamagedSample(f"wrong type: {column} is neither a text nor a list of texts")


class RowReader:
    """Reads rows by place; a context manager that keeps the files open."""

    def __init__(self, files: list[RowFile]) -> None:
        self._files = files
        self._stack = ExitStack()
        self._descriptors: dict[int, int] = {}

    def __enter__(self) -> "RowReader":
        csv.field_size_limit(CELL_LIMIT)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, file: int, offset: int, size: int, joins: Container[str] = ()) -> dict[str, Any]:
        """Return the cells of the row at a place. joins: columns of the join value, whose cells stay text.

        Raises: UserError where the file is gone or has changed.
        """
        path = self._files[file].path
        try:
            if file not in self._descriptors:
                opened = open(path, "rb", opener=regular_only)  # noqa: SIM115 - the stack closes it
                self._descriptors[file] = self._stack.enter_context(opened).fileno()
            return self._files[file].cells(os.pread(self._descriptors[file], size, offset), joins)
        except (OSError, ValueError, csv.Error, StopIteration) as error:
            raise UserError(f"{path}: no row at byte {offset} any more: {error}; has it changed?") from error
