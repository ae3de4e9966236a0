"""The reference of all config keys, made of the config's types and descriptions: docs/config.md, and `--help-keys`.

`python -m cosmos_scale.config.reference` prints docs/config.md.
"""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, PlainSerializer
from pydantic.fields import FieldInfo

from cosmos_scale.config import RunConfig
from cosmos_scale.config.keys import PlacedSection, kind_of, nearest_key, sections, sections_in, with_positions_named
from cosmos_scale.config.paths import LOCAL_KEYS
from cosmos_scale.config.section import MAY_DIFFER_BY_HOST, RESUME_MAY_CHANGE, has_mark
from cosmos_scale.errors import UserError

WIDTH = 80  # columns of a terminal
SECTION = "section"  # the type, in words, of a key that holds keys
PLACE = "path, URL or command"  # the type, in words, of a key for all of them

HEADER = """\
# The keys of a run's config

Written by `make docs` from `cosmos_scale/config/`; a change belongs there. `cosmos-scale train --help-keys [PREFIX]`
prints the same in a terminal.

A run is a YAML file. `extends: base.yaml`, or a list of files, names files whose keys come first; their paths are
relative to the file, and `cosmos:train/published` is a config of the package (`cosmos-scale configs` lists them). On
the command line `data.sources.0.shards=/data/cc3m` replaces a key. `N` below stands for a position in a list, counted
from 0. In every path ~ stands for the home folder, and $NAME or ${NAME} for a variable of the environment, which must
be set; URLs and `pipe:` commands, where a key may be one, are taken as they are.

- **Resume**: a run that is resumed from a checkpoint may have another value. Every other key belongs to the run's
  identity: a resumed run is refused where the key differs from the checkpoint's.
- **Hosts**: the hosts of one run may have different values. Every other key must be the same for all ranks.
"""


class KeyHelp(NamedTuple):
    """What the reference says of a key; default: "required" where there is none."""

    key: str
    type: str
    default: str
    meaning: str
    resume_may_change: bool
    may_differ_by_host: bool


def describe(section: PlacedSection) -> list[KeyHelp]:
    """Return what the reference says of a section's own keys."""
    return [
        KeyHelp(
            section.key(name),
            _type_of_key(section.key(name), field),
            _default(field),
            _meaning(field),
            has_mark(field, RESUME_MAY_CHANGE),
            has_mark(field, MAY_DIFFER_BY_HOST),
        )
        for name, field in section.type.model_fields.items()
    ]


def markdown(root: type[BaseModel] = RunConfig) -> str:
    """Return docs/config.md: a heading and a table for each section."""
    parts = [HEADER]
    for section in sections(root):
        title = f"`{section.place}`{_variant(section.type)}" if section.place else "The run"
        level = "###" if "." in section.place else "##"
        lines = [
            f"{level} {title}",
            "",
            _escaped(_docstring(section.type)),
            "",
            "| key | type | default | what it is | resume | hosts |",
            "|---|---|---|---|---|---|",
            *(_table_line(key) for key in describe(section)),
        ]
        parts.append("".join(f"{line}\n" for line in lines))
    return "\n".join(parts)


def help_keys(prefix: str) -> str:
    """Return the reference of the keys that a prefix selects, for a terminal.

    prefix: a section or a key, which selects all keys below it, or else the beginning of keys; "" selects all. Raises
    UserError where it selects none.
    """
    pattern = with_positions_named(prefix.removesuffix("."))
    found = [(section, describe(section)) for section in sections()]
    names = [key.key for _, keys in found for key in keys]
    if pattern and pattern in {*names, *(section.place for section, _ in found)}:
        selected = {name for name in names if name == pattern or name.startswith(f"{pattern}.")}
    else:
        selected = {name for name in names if name.startswith(pattern)}
    if not selected:
        raise UserError(f"--help-keys {prefix}: no such key; did you mean {nearest_key(prefix)}?")
    blocks = []
    for section, keys in found:
        # A section that is always there has a heading of its own.
        shown = [key for key in keys if key.key in selected and key.type != SECTION]
        if shown:
            heading = f"{section.place or 'the run'}{_variant(section.type)}: {_docstring(section.type)}"
            blocks.append("\n\n".join([textwrap.fill(heading, WIDTH), *map(_terminal_lines, shown)]))
    return "\n\n\n".join(blocks)


def _type_of_key(key: str, field: FieldInfo) -> str:
    words = type_in_words(field.annotation, field.metadata)
    return words.replace(PLACE, "path") if with_positions_named(key) in LOCAL_KEYS else words


def type_in_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return the type of a key and its limits, in words.

    metadata: what pydantic keeps of the limits beside the annotation.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [
            part for extra in arguments[1:] for part in (extra.metadata if isinstance(extra, FieldInfo) else [extra])
        ]
        return type_in_words(arguments[0], [*inner, *metadata])
    if origin in (Union, UnionType):
        kinds = [type_in_words(argument, metadata) for argument in arguments if argument is not NoneType]
        return _any_of(list(dict.fromkeys(kinds))) + (", or null" if NoneType in arguments else "")
    if origin is Literal:
        return _any_of([str(value) for value in arguments])
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list, each {type_in_words(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}, each {_any_of(list(dict.fromkeys(map(type_in_words, arguments))))}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return SECTION
    if annotation is str and any(isinstance(part, PlainSerializer) for part in metadata):
        return PLACE
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
    return names[annotation] + _limits(metadata, whole=annotation is int)


def _limits(metadata: Sequence[Any], *, whole: bool) -> str:
    names = ("ge", "gt", "le", "lt")
    bounds = {name: getattr(limit, name) for limit in metadata for name in names if hasattr(limit, name)}
    if whole and "gt" in bounds:
        bounds["ge"] = bounds.pop("gt") + 1
    if whole and "lt" in bounds:
        bounds["le"] = bounds.pop("lt") - 1
    if bounds.keys() == {"ge", "le"}:
        return f" from {_yaml(bounds['ge'])} to {_yaml(bounds['le'])}"
    words = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    return " and".join(f" {words[name]} {_yaml(bound)}" for name, bound in bounds.items())


def _any_of(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "" if isinstance(default, BaseModel) else _yaml(default)


def _yaml(value: Any) -> str:
    """Return a value as a YAML file has it; numbers are rounded to six digits."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _meaning(field: FieldInfo) -> str:
    """Return a field's description; a section without one is described by its docstring."""
    if field.description is not None:
        return field.description
    return " ".join(_docstring(section) for section, _ in sections_in(field.annotation))


def _docstring(section: type[BaseModel]) -> str:
    paragraph = (section.__doc__ or "").strip().partition("\n\n")[0]
    return " ".join(paragraph.split())


def _variant(section: type[BaseModel]) -> str:
    """Return what tells the sections of one list apart, such as " (kind: retrieval)"; "" for every other section."""
    return f" (kind: {kind})" if (kind := kind_of(section)) else ""


def _escaped(text: str) -> str:
    return re.sub(r"([|*<])", r"\\\1", text)


def _table_line(key: KeyHelp) -> str:
    default = f"`{key.default}`" if key.default not in ("", "required") else key.default
    marks = ("yes" if mark else "" for mark in (key.resume_may_change, key.may_differ_by_host))
    cells = (f"`{key.key.rpartition('.')[2]}`", _escaped(key.type), default, _escaped(key.meaning), *marks)
    return f"| {' | '.join(cells)} |".replace("  ", " ")


def _terminal_lines(key: KeyHelp) -> str:
    marks = {"may change on resume": key.resume_may_change, "may differ by host": key.may_differ_by_host}
    default = f" = {key.default}" if key.default != "required" else " (required)"
    facts = "; ".join([key.type, *(words for words, mark in marks.items() if mark)])
    return "\n".join([f"  {key.key}{default}", *_indented(facts), *_indented(key.meaning)])


def _indented(text: str) -> list[str]:
    indent = " " * 6
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    print(markdown(), end="")
