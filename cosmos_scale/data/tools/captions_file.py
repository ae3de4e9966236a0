"""Files of captions, one row a picture: JSON lines or CSV, with DreamLIP's, PixelProse's or plain columns."""

import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_scale.data.prepare.cells import read_cell
from cosmos_scale.data.prepare.csv_records import (
    CELL_LIMIT,
    read_header,
    read_records,
    refuse_columns_twice,
)
from cosmos_scale.data.samples.caption_keys import (
    KNOWN_NAMES,
    OTHER_NAMES,
    has_text,
    holds_caption,
    is_missing,
    may_be_caption,
    plain_column,
)
from cosmos_scale.data.samples.document import parse_json
from cosmos_scale.data.samples.file_kind import no_text, refuse_no_text
from cosmos_scale.errors import UserError
from cosmos_scale.files import regular_only, whole_path
from cosmos_scale.words import with_article

# Columns that name the picture, in order of preference; compared in lower case with "_" for spaces.
IMAGE_COLUMNS = ("image", "image_path", "file_name", "filename", "filepath", "file", "path", "key")

# A key of one's own: the name before the first dot of a tar's members, in one folder.
_KEY = re.compile(r"(?!__)[^./\\\x00-\x1f\x7f]{1,200}")

_HALF = re.compile(r"[\ud800-\udfff]")  # json may spell it; no file can hold it as text

# A whole number as a column of floats has it: pandas makes floats of a column of numbers in which a cell is empty.
# More digits may be lost in a float.
_WHOLE_NUMBER = re.compile(r"(0|-?[1-9][0-9]{0,14})\.0")

# What a line of the rejected.jsonl of a build holds. Its `captions` is the name of a file.
REJECT_KEYS = {"captions", "row", "key", "image", "reason"}


class Columns(NamedTuple):
    """The columns that the user names, in plain form; None where the known names are looked for.

    image: the column of pictures. caption: the only column that is read for captions; its text becomes `caption`.
    key: the column of samples' keys, which are the rows' numbers otherwise.
    """

    image: str | None = None
    caption: str | None = None
    key: str | None = None

    @property
    def image_names(self) -> tuple[str, ...]:
        """The columns that may name the picture, in order of preference."""
        return IMAGE_COLUMNS if self.image is None else (self.image,)

    def caption_keys(self, present: Container[str]) -> dict[str, str]:
        """Return the columns of captions, and the json keys that they become, of a row with some columns."""
        if self.caption is not None:
            return {self.caption: "caption"}
        if any(name in present for name in KNOWN_NAMES):
            return KNOWN_NAMES
        other = next((name for name in OTHER_NAMES if name in present), None)
        return KNOWN_NAMES if other is None else {other: "caption"}

    @property
    def caption_names(self) -> tuple[str, ...]:
        """The columns that may hold captions."""
        return (*KNOWN_NAMES, *OTHER_NAMES) if self.caption is None else (self.caption,)


DEFAULT_COLUMNS = Columns()


class CaptionRow(NamedTuple):
    """One row of a captions file.

    number: from 1, header left out. image: the picture that the row names. document: the row's captions. fault: what is
    wrong with the row, if anything is. unread: columns called as captions are called, whose text is not read.
    joined: the numbers of later rows of the same picture, whose captions are in the document. key: that of the sample,
    where the file says it.
    """

    number: int
    image: str | None
    document: dict[str, str | list[str]]
    fault: str | None
    unread: tuple[str, ...] = ()
    joined: tuple[int, ...] = ()
    key: str | None = None


def read_rows(path: Path, columns: Columns = DEFAULT_COLUMNS) -> Iterator[CaptionRow]:
    """Yield the rows of a .jsonl or .csv file in order; rows that cannot be used have a fault.

    Raises: UserError where the file cannot be read, is of another kind, or its header lacks a needed column.
    """
    readers = {".jsonl": _read_json_lines, ".csv": _read_csv}
    try:
        if path.suffix.lower() not in readers:
            said = no_text(path)
            if not said and path.suffix.lower() == ".json":
                raise UserError(
                    f"{path}: captions come as .jsonl or .csv; rule: of a list, `jq -c '.[]'` makes a .jsonl"
                )
            raise UserError(f"{path}: captions come as .jsonl or .csv{f'; it {said}' if said else ''}")
        refuse_no_text(path)
        yield from readers[path.suffix.lower()](path, columns)
    except OSError as error:
        raise UserError(f"{whole_path(path)}: cannot be read: {error.strerror or error}") from error


def count_lines(path: Path) -> int:
    """Count a file's lines: its rows, or a few more where cells hold line breaks."""
    try:
        with open(path, "rb", opener=regular_only) as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except OSError as error:
        raise UserError(f"{whole_path(path)}: cannot be read: {error.strerror or error}") from error


def _read_json_lines(path: Path, columns: Columns) -> Iterator[CaptionRow]:
    with open(path, "rb", opener=regular_only) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = parse_json(line)
            except (ValueError, RecursionError) as error:
                if number == 1 and b"\r" in line.rstrip():
                    raise UserError(f"{path}: its lines end in CR; rule: lines end in LF, or CR and LF") from error
                if number == 1 and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
                    raise _one_array(path) from error
                if number == 1 and line.strip(b"\xef\xbb\xbf \t\r\n") == b"{":
                    raise UserError(
                        f"{path}: its objects span lines; rule: .jsonl holds one a line, as `jq -c .` writes them"
                    ) from error
                yield CaptionRow(number, None, {}, f"not json: {error}")
                continue
            if number == 1 and isinstance(values, dict) and set(values) == REJECT_KEYS:
                raise UserError(f"{path}: is a report of rejects, which holds no captions; give the file that was read")
            if number == 1 and isinstance(values, list) and any(isinstance(value, dict) for value in values):
                raise _one_array(path)
            if isinstance(values, dict):
                yield _row(number, values, columns)
            else:
                yield CaptionRow(number, None, {}, f"not an object: json is {with_article(type(values).__name__)}")


def _one_array(path: Path) -> UserError:
    return UserError(f"{path}: is one json array; rule: .jsonl holds one object a line, as `jq -c '.[]'` writes them")


def _read_csv(path: Path, columns: Columns) -> Iterator[CaptionRow]:
    # Bytes that are not UTF-8 become lone surrogates, so that only the rows with such bytes are lost.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="", opener=regular_only) as file:
        records = read_records(file, spaced=True)
        header = read_header(path, records)
        present = {plain_column(name) for name in header}
        for needed, known, option in (
            ("picture", columns.image_names, "--image-column"),
            ("caption", columns.caption_names, "--caption-column"),
        ):
            if present.isdisjoint(known):
                raise UserError(
                    f"{path}: no {needed} column among {', '.join(header) or 'none'}; "
                    f"one of these is needed: {', '.join(known)}; {option} names another"
                    f"{_list_hint(dict.fromkeys(present, 'a text')) if needed == 'caption' else ''}"
                )
        if columns.key is not None and columns.key not in present:
            raise UserError(f"{path}: no column --key {columns.key} among {', '.join(header)}")
        used = {*columns.image_names, *columns.caption_keys(present), *filter(None, [columns.key])}
        refuse_columns_twice(path, header, used)
        for number, record in enumerate(records, start=1):
            cells = record.cells
            if fault := next(filter(None, map(_undecoded, cells)), record.fault):
                values = dict(zip(map(plain_column, header), cells, strict=False))
                yield CaptionRow(number, _named(values, columns), {}, fault)
            elif cells:
                yield _row(number, dict(zip(map(plain_column, header), cells, strict=True)), columns)


def _row(number: int, values: dict[str, Any], columns: Columns) -> CaptionRow:
    plain = {(column := plain_column(name)): read_cell(column, value) for name, value in values.items()}
    shown = ", ".join(values) or "nothing"
    image = _named(plain, columns)
    if image is None:
        wanted = ", ".join(columns.image_names)
        return CaptionRow(number, None, {}, f"no picture named: expected one of {wanted}; the row has {shown}")
    if image.startswith(("[", "{")) and not isinstance(named := _first_named(plain, columns), str):
        kind = "list" if isinstance(named, list) else "object"
        return CaptionRow(number, image, {}, f"wrong type: the picture is named by a json {kind}, not by a text")
    used = {*columns.image_names, *columns.caption_keys(plain), *filter(None, [columns.key])}
    if len(plain) < len(values) and (twice := next(filter(used.__contains__, _twice(values)), None)):
        return CaptionRow(number, image, {}, f"two keys of one name: {twice}; the row has {shown}")
    own_key = None if columns.key is None else _own_key(plain.get(columns.key, ""))
    if own_key is not None and (fault := _key_fault(plain.get(columns.key or ""), own_key)):
        return CaptionRow(number, image, {}, f"{fault}; the row has {shown}")
    document: dict[str, str | list[str]] = {}
    for column, key in columns.caption_keys(plain).items():
        value = plain.get(column)
        if is_missing(value):
            continue
        if not isinstance(value, str) and not (
            isinstance(value, list) and all(isinstance(sentence, str) for sentence in value)
        ):
            return CaptionRow(number, image, {}, f"wrong type: {column} is neither a string nor a list of strings")
        if (length := _length(value)) > CELL_LIMIT:
            return CaptionRow(number, image, {}, f"too long: {column} has {length:,} letters, more than {CELL_LIMIT:,}")
        if has_text(value):
            if key in document:
                return CaptionRow(number, image, {}, f"two captions for {key}: {column} is one; the row has {shown}")
            document[key] = value
    # Whoever names the only column of captions knows of the others.
    others = plain.items() if columns.caption is None else ()
    unread = tuple(name for name, value in others if name not in used and may_be_caption(name, value))
    fault = None if document else _no_caption(plain, columns, shown)
    if document and not any(holds_caption(key, value) for key, value in document.items()):
        fault = f"no caption: no sentence in {', '.join(document)}"
    return CaptionRow(number, image, document, fault, unread, key=own_key)


def with_unique_keys(rows: Iterable[CaptionRow]) -> Iterator[CaptionRow]:
    """Yield the rows in order; of two with one key of their own the later one has a fault."""
    seen: dict[str, int] = {}
    for row in rows:
        if row.key is None or row.fault is not None:
            yield row
        elif (first := seen.setdefault(row.key, row.number)) != row.number:
            yield row._replace(fault=f"key of another row: {row.key} is the key of row {first}", key=None)
        else:
            yield row


def _own_key(value: object) -> str:
    """Return a row's own key; that of a whole number which is written as 7.0 is 7."""
    key = str(value).strip()
    whole = _WHOLE_NUMBER.fullmatch(key)
    return key if whole is None else whole[1]


def _key_fault(value: object, key: str) -> str | None:
    """What is wrong with a row's own key; None where nothing is."""
    if value == "" or is_missing(value):
        return "no key: --key names an empty one"
    if isinstance(value, (bool, list, dict)):
        kind = {bool: "true or false", list: "a list", dict: "an object"}[type(value)]
        shown = json.dumps(value, ensure_ascii=False)[:40]
        return f"wrong key: {shown} is {kind}; rule: a key is a text or a whole number"
    if isinstance(value, float) and not _WHOLE_NUMBER.fullmatch(str(value)):
        return (
            f"wrong key: {value!r} is a float; rule: a key is a text or a whole number, as a float of at most 15 digits"
        )
    if half := _HALF.search(key):  # the key is a name in a tar, which would hold another one, or none
        return f"wrong key: {key[:40]!r} is no text: half of a surrogate pair, \\u{ord(half[0]):04x}, is in it"
    if not isinstance(value, (str, int, float)) or not _KEY.fullmatch(key):
        return f"wrong key: {key[:40]!r}; rule: at most 200 characters, none of them . / \\, and no __ before them"
    return None


def _length(value: str | list[str]) -> int:
    """The letters of a caption, or of all sentences of a list."""
    return len(value) if isinstance(value, str) else sum(map(len, value))


def _twice(names: Iterable[str]) -> list[str]:
    """The plain names that some names have in common."""
    return [name for name, count in Counter(map(plain_column, names)).items() if count > 1]


def _no_caption(plain: dict[str, Any], columns: Columns, shown: str) -> str:
    empty = [name for name in columns.caption_names if name in plain and not has_text(plain[name])]
    if empty:
        return f"no caption: empty is {', '.join(empty)}"
    return f"no caption: expected one of {', '.join(columns.caption_names)}; the row has {shown}{_list_hint(plain)}"


def _list_hint(plain: Mapping[str, Any]) -> str:
    """How several captions of a picture are given, where columns such as caption_1 and caption_2 hold them."""
    if sum(may_be_caption(name, value) for name, value in plain.items()) < 2:
        return ""
    return "; several captions of a picture are a json list in one column, or a row each with --join-rows"


def _named(plain: dict[str, Any], columns: Columns) -> str | None:
    """The picture that a row names, by its plain columns."""
    value = _first_named(plain, columns)
    return None if value is None else str(value)


def _first_named(plain: dict[str, Any], columns: Columns) -> Any:
    """The value of the first column of pictures that has one; None where none has."""
    values = (plain.get(name) for name in columns.image_names)
    return next((value for value in values if value != "" and not is_missing(value)), None)


def _undecoded(cell: str) -> str | None:
    """What is wrong with a cell that holds bytes that are not UTF-8; None for other cells."""
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        return f"not UTF-8: byte 0x{ord(cell[error.start]) - 0xDC00:02x} in a cell; save the file as UTF-8"
    return None
