"""Values of overrides: what stands behind `dotted.key=` on a command line, read by the key's type."""

import functools
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from cosmos_scale.config.evaluation import new_key
from cosmos_scale.config.keys import sections, with_positions_named
from cosmos_scale.config.yaml_text import parse_yaml
from cosmos_scale.errors import UserError


def override_value(key: str, text: str, where: str) -> Any:
    """Return the value of a dotted key; where: what an error names.

    A key of text takes the text as it stands, or what stands between quotes. `null`, or nothing, means null where the
    key may be null. Every other key, or an unknown one, reads the text as YAML. Raises UserError where it cannot.
    """
    may_be_null = _text_keys().get(with_positions_named(new_key(key)))
    if may_be_null is not None:
        return _text(text, where, may_be_null=may_be_null)
    try:
        value = parse_yaml(text, where)
    except UserError as error:
        if text.count("[") + text.count("{") > text.count("]") + text.count("}"):
            raise UserError(f"{error}; rule: quotes around all of it, '{key}=...', or the shell parts it") from None
        raise
    # A comment has no sense in an override: what it would hide is shown in the refusal.
    return text if "#" in text and isinstance(value, (bool, int, float, NoneType)) else value


def _text(text: str, where: str, *, may_be_null: bool) -> str | None:
    if may_be_null and text in ("", "null"):
        return None
    if not text:
        raise UserError(f"{where}: nothing stands behind the =; rule: this key must have a value")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            inner = parse_yaml(text, where)
        except UserError:
            return text
        return inner if isinstance(inner, str) else text
    return text


@functools.cache
def _text_keys() -> dict[str, bool]:
    """Return the dotted keys that take a text, elements of lists among them (`N`), and whether each may be null."""
    found = {}
    for section in sections():
        for name, field in section.type.model_fields.items():
            key = section.key(name)
            for inner, types in ((key, _alternatives(field.annotation)), (f"{key}.N", _elements(field.annotation))):
                kinds = [kind for kind in types if kind is not NoneType]
                if kinds and all(kind in (str, Path) for kind in kinds):
                    found[inner] = NoneType in types
    return found


def _alternatives(annotation: Any) -> list[Any]:
    """Return the types that a value may have; each word of a Literal counts as its type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _alternatives(arguments[0])
    if origin in (Union, UnionType):
        return [kind for argument in arguments for kind in _alternatives(argument)]
    if origin is Literal:
        return [type(value) for value in arguments]
    return [annotation]


def _elements(annotation: Any) -> list[Any]:
    """Return the types that the elements of a list may have, where a value may be one."""
    return list(_elements_of(_alternatives(annotation)))


def _elements_of(kinds: list[Any]) -> Iterator[Any]:
    for kind in kinds:
        if get_origin(kind) in (tuple, list):
            for argument in get_args(kind):
                if argument is not Ellipsis:
                    yield from _alternatives(argument)
