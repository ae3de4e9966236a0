"""Parquet files, read in batches of rows: the one place for pyarrow."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from cosmos_scale.errors import UserError
from cosmos_scale.files import regular_only

BATCH_ROWS = 4096


def column_names(path: Path) -> list[str]:
    """Return the names of a file's columns; raises UserError where it is no parquet file."""
    try:
        return list(pyarrow.parquet.read_schema(_regular(path)).names)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet: {_first_line(error)}") from error


def count_rows(path: Path) -> int:
    """Return a file's number of rows, from its footer."""
    try:
        return int(pyarrow.parquet.read_metadata(_regular(path)).num_rows)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet: {_first_line(error)}") from error


def read_columns(path: Path, columns: Sequence[str]) -> Iterator[list[list[Any]]]:
    """Yield batches of rows: for each column, the list of its values.

    Raises: UserError where the file cannot be read.
    """
    try:
        with pyarrow.parquet.ParquetFile(_regular(path)) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns)):
                yield [_values(batch.column(name)) for name in columns]
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet: {_first_line(error)}") from error


def _values(column: Any) -> list[Any]:
    """The values of a column; bytes for a text that is not UTF-8."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return bytes(scalar.as_buffer()) if hasattr(scalar, "as_buffer") else [_value(item) for item in scalar.values]


def version() -> str:
    """Return pyarrow's version."""
    return str(pyarrow.__version__)


def _regular(path: Path) -> Path:
    """Return a path that pyarrow may open; raises OSError where to open it would wait for ever."""
    with open(path, "rb", opener=regular_only):
        return path


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
