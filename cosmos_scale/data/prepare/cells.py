"""What a cell of a captions file says: one rule for CSV, JSON lines and parquet."""

import ast
import io
import json
import tokenize
from typing import Any

from cosmos_scale.data.samples.caption_keys import WHOLE_KEYS

_BRACKETS = {("[", "]"), ("(", ")")}
# What pandas (and `astype(str)`), R, databases and spreadsheets write for a value that they lack. pandas reads all of
# them so, but MySQL's \N.
_LACKS = frozenset(
    {"nan", "NaN", "-nan", "-NaN", "None", "<NA>", "NA", "N/A", "n/a", "#N/A", "#NA", "NULL", "null", "\\N"}
)


def read_cell(column: str, value: Any) -> Any:
    """Return what a cell says: None for a text of _LACKS.

    A text may spell a list of strings in json or Python's syntax, or a tuple, but for columns of WHOLE_KEYS: then the
    list. It may hold other items too, which its reader refuses; a list without strings is text. Values that are no text
    stay.
    column: its plain name.
    """
    if isinstance(value, str) and value in _LACKS:
        return None
    if column in WHOLE_KEYS or not (isinstance(value, str) and (value[:1], value[-1:]) in _BRACKETS):
        return value
    for parse in (json.loads, _python_list):
        try:
            listed = parse(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(listed, list | tuple) and (not listed or any(isinstance(item, str) for item in listed)):
            return list(listed)
    return value


def _python_list(cell: str) -> object:
    """Read a list in Python's syntax, or one of strings without commas, as pandas writes arrays of numpy.

    Python itself would join strings without commas between them to one.
    """
    value = ast.literal_eval(cell)
    tokens = tokenize.generate_tokens(io.StringIO(cell).readline)
    strings = [token.string for token in tokens if token.type == tokenize.STRING]
    if isinstance(value, list) and len(strings) > len(value) and all(isinstance(item, str) for item in value):
        return [ast.literal_eval(string) for string in strings]
    return value
