"""The records of CSV files: a record may span lines, but a quote that is never closed must not swallow the file.

The record with such a quote has a fault, and the lines behind the quote's line are read as records of their own.
"""

import csv
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.data.samples.caption_keys import plain_column
from cosmos_scale.errors import UserError

# Characters of one cell, and lines of one record. Captions have fewer; an unclosed quote soon reaches one of the two.
CELL_LIMIT = 1 << 24
LINE_LIMIT = 1000
# So many lines of a record that have the header's number of cells each are records, not the text of a cell.
MOST_ROWS_ALIKE = 5
# So is a single line that also has a picture's name or address where the record itself has one.
_PICTURE = re.compile(r".+\.(?:jpe?g|png|webp)|https?://\S+", re.IGNORECASE)


# The line by which Excel is told what separates the cells below it: no row and no header.
_SEPARATOR_LINE = re.compile(r'"?sep=([^\w\s"]|\t)"?\s*', re.IGNORECASE)


class CsvRecord(NamedTuple):
    """One record. line: where it starts, from 1. lines: how many it takes. fault: what is wrong with it, if anything.

    The cells of a record with a fault are the reader's guess; there may be none.
    """

    line: int
    lines: int
    cells: list[str]
    fault: str | None


def refuse_columns_twice(path: Path, header: Iterable[str], used: Collection[str]) -> None:
    """Raise UserError where a header has two columns of one plain name that is in use: cells of one would be lost."""
    named: dict[str, str] = {}
    for column in header:
        name = plain_column(column)
        if name in named and name in used:
            raise UserError(
                f"{path}: two columns are called {name} ({named[name]}, {column}); rename one or leave one out"
            )
        named.setdefault(name, column)


def read_header(path: Path, records: Iterator[CsvRecord]) -> list[str]:
    """Take a CSV file's header from its records; empty lines may stand before it.

    Raises: UserError where the header has a fault, or its columns are separated by something else than commas.
    """
    first = next((record for record in records if record.cells or record.fault is not None), None)
    if first is not None and first.fault is not None:
        raise UserError(f"{path}: its header cannot be read: {first.fault}")
    header = [] if first is None else first.cells
    for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars (|)")):
        if len(header) == 1 and separator in header[0]:
            raise UserError(
                f"{path}: its columns are separated by {name}; rule: commas separate the columns of a .csv, or what "
                "its first line names, such as sep=;"
            )
    return header


def named_separator(line: str) -> str | None:
    """Return what separates cells by a file's first line, where it is such a line (`sep=;`); None for other lines."""
    found = _SEPARATOR_LINE.fullmatch(line)
    return None if found is None else found[1]


class _TooManyLines(Exception):
    pass


class _Feed:
    """Feeds a csv reader with lines. taken: the lines of the record being read. ended: whether it met the end."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.taken: list[str] = []
        self.ended = False
        self._lines = iter(lines)
        self._again: deque[str] = deque()

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        if len(self.taken) == LINE_LIMIT:
            raise _TooManyLines
        line = self._again.popleft() if self._again else next(self._lines, None)
        if line is None:
            self.ended = True
            raise StopIteration
        self.taken.append(line)
        return line

    def begin(self) -> None:
        """Begin a record."""
        self.taken.clear()
        self.ended = False

    def give_back(self, kept: int) -> None:
        """Put all lines of the record but the first `kept` back, to be read again."""
        self._again.extendleft(reversed(self.taken[kept:]))
        del self.taken[kept:]


def read_records(lines: Iterable[str], delimiter: str = ",", *, spaced: bool = False) -> Iterator[CsvRecord]:
    """Yield the records of a CSV file's lines in order; an empty line is a record without cells.

    delimiter: what separates cells, unless the first line names something else (`sep=;`, as Excel reads it); that line
    is a record without cells too. The header is the first record with cells. spaced: whether a quote may stand behind
    spaces, as people write it: in `1.jpg, "a cat"`. Else such quotes are a part of the text.
    A record of another number of cells than the header has a fault; its lines, however many, are this record's. So have
    all records behind a second header whose columns stand in another order, as `cat` joins files: the cells of one
    column would be taken for those of another.
    """
    csv.field_size_limit(CELL_LIMIT)
    lines = iter(lines)
    first = next(lines, None)
    line, width = 1, None
    header: list[str] = []
    turned = None
    if first is not None and (named := named_separator(first)) is not None:
        delimiter = named
        yield CsvRecord(line, 1, [], None)
        line += 1
    elif first is not None:
        lines = chain([first], lines)
    feed = _Feed(lines)
    reader = csv.reader(feed, delimiter=delimiter)
    while True:
        feed.begin()
        fault, cells = None, []
        try:
            cells = next(reader)
            if len(feed.taken) > 1 or feed.ended:
                fault = _unclosed(feed, cells, line, width, delimiter)
            elif '"' in feed.taken[0] and not _is_strict(feed.taken, delimiter):
                rule = 'a quote inside a quoted cell is written twice (""), not with a backslash'
                fault = f"stray quote: on line {line:,}; {rule}"
            elif spaced and f"{delimiter} " in feed.taken[0] and '"' in feed.taken[0]:
                cells, fault = _spaced(feed.taken[0], cells, line, delimiter)
        except StopIteration:
            return
        except _TooManyLines:
            cells = next(csv.reader(feed.taken, delimiter=delimiter))
            fault = _swallowing(feed, cells, line, f"its cell does not end within {LINE_LIMIT:,} lines")
        except csv.Error as error:
            fault = f"not csv: {error}"
            if "new-line character" in str(error):  # Python's advice is on how to open a file
                fault = f"not csv: CR inside line {line + len(feed.taken) - 1:,}; rule: lines end in LF, or CR and LF"
            if len(feed.taken) > 1:
                fault += f"; {_behind(len(feed.taken) - 1)}"
                feed.give_back(1)
        if fault is None and cells and width is not None and len(cells) != width:
            fault = f"wrong number of cells: {len(cells)}, the header has {width}"
            if len(feed.taken) > 1:
                fault += f"; it takes lines {line:,} to {line + len(feed.taken) - 1:,}: is a quote in it left open?"
        if fault is None and any("\0" in cell for cell in cells):
            fault = "not text: NUL in a cell"
        if fault is None and _is_header_again(cells, header):
            turned = None if cells == header else f"line {line:,} is a header again, with its columns in another order"
        fault = fault or (turned if cells else None)
        yield CsvRecord(line, len(feed.taken), cells, fault)
        line += len(feed.taken)
        header = header or cells
        width = len(header) or None


def _is_header_again(cells: list[str], header: list[str]) -> bool:
    """Whether a record's cells are the names of a header's columns, in whatever order; names that differ."""
    return len(cells) > 1 and sorted(cells) == sorted(header) and len({*cells, ""}) == len(cells) + 1


def _unclosed(feed: _Feed, cells: list[str], line: int, width: int | None, delimiter: str) -> str | None:
    """Judge a record of several lines or at the file's end: what shows that a quote in it was left open, if anything.

    csv.reader forgives text behind a closing quote. Such text, where a record spans lines, begins another row's cell:
    the quote before it opened the cell, and did not close the one before.
    """
    if not _is_strict(feed.taken, delimiter):
        return _swallowing(feed, cells, line, "the file ends in its cell" if feed.ended else "another quote follows it")
    if width is None or len(cells) != width:
        return None
    behind = [_cells(text, delimiter) for text in feed.taken[1:]]
    are_rows = width > 1 and len(behind) > 0 and all(len(others) == width for others in behind)
    if are_rows and (len(behind) > MOST_ROWS_ALIKE or all(_name_pictures(cells, others) for others in behind)):
        return _swallowing(feed, cells, line, "its cell is made of rows")
    return None


def _name_pictures(cells: list[str], others: list[str]) -> bool:
    return any(
        _PICTURE.fullmatch(cell) and _PICTURE.fullmatch(other) for cell, other in zip(cells, others, strict=True)
    )


def _is_strict(lines: list[str], delimiter: str) -> bool:
    """Return whether a delimiter or the line's end follows each closing quote, and no quote is left open."""
    try:
        for _ in csv.reader(lines, delimiter=delimiter, strict=True):
            pass
    except csv.Error:
        return False
    return True


def _spaced(text: str, cells: list[str], line: int, delimiter: str) -> tuple[list[str], str | None]:
    """Return a line's cells, those behind spaces without their quotes, and what is wrong; cells: as they are else."""
    try:
        found = next(csv.reader([text], delimiter=delimiter, skipinitialspace=True, strict=True))
        if len(found) != len(cells):  # a quoted cell holds a delimiter
            return found, None
        pairs = zip(cells, found, strict=True)
        return [bare if cell.lstrip(" ").startswith('"') else cell for cell, bare in pairs], None
    except csv.Error as error:
        if "unexpected end" not in str(error):  # text stands behind the closing quote: the cell is not quoted
            return cells, None
    fault = f"stray quote: on line {line:,} a quote behind a space is not closed; rule: no space before a quoted cell"
    return cells, fault


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line.rstrip("\r\n")], delimiter=delimiter), [])


def _swallowing(feed: _Feed, cells: list[str], line: int, sign: str) -> str:
    """Give back the lines behind the one where a quote was left open, and name both."""
    breaks = [cell.count("\n") for cell in cells]
    # The cell that was left open is the last one that holds line breaks.
    open_cell = max((number for number, count in enumerate(breaks) if count), default=0)
    kept = min(1 + sum(breaks[:open_cell]), len(feed.taken))
    behind = len(feed.taken) - kept
    feed.give_back(kept)
    fault = f"unclosed quote: opened on line {line + kept - 1:,}, {sign}"
    return f"{fault}; {_behind(behind)}" if behind else fault


def _behind(count: int) -> str:
    lines = "the line behind it" if count == 1 else f"the {count:,} lines behind it"
    return f"{lines} may belong to it, and {'is read as a row' if count == 1 else 'are read as rows'}"
