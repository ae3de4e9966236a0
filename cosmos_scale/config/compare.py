"""Which keys differ between two configs and may not: a checkpoint's and the resuming run's, or those of two hosts."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from cosmos_scale.config import RunConfig
from cosmos_scale.config.section import MAY_DIFFER_BY_HOST, RESUME_MAY_CHANGE, has_mark

_LONGEST = 80  # characters of a value in a message


class Difference(NamedTuple):
    """A dotted key that two configs have different values of: `one` in the first config, `other` in the second."""

    key: str
    one: Any
    other: Any

    def __str__(self) -> str:
        """Return the key with the second config's value, and the first config's value as the former one."""
        return f"{self.key}: {_shown(self.other)}, was {_shown(self.one)}"


def changed_on_resume(old: RunConfig, new: RunConfig) -> list[Difference]:
    """Return what differs between a checkpoint's config and the resuming run's, and may not."""
    return list(_differences(old, new, RESUME_MAY_CHANGE, ""))


def different_between_hosts(one: BaseModel, other: BaseModel) -> list[str]:
    """Return the dotted keys of a config, or of a section, that differ between two hosts of one run, and may not."""
    return [difference.key for difference in _differences(one, other, MAY_DIFFER_BY_HOST, "")]


def _differences(one: Any, other: Any, mark: dict[str, Any], key: str) -> Iterator[Difference]:
    """Yield what differs, below a key, and whose fields lack the mark; sections and lists are looked into."""
    if isinstance(one, BaseModel) and type(one) is type(other):
        for name, field in type(one).model_fields.items():
            if not has_mark(field, mark):
                inner = f"{key}.{name}" if key else name
                yield from _differences(getattr(one, name), getattr(other, name), mark, inner)
    elif _is_list_of_sections(one) and _is_list_of_sections(other) and len(one) == len(other):
        for position, (one_item, other_item) in enumerate(zip(one, other, strict=True)):
            yield from _differences(one_item, other_item, mark, f"{key}.{position}")
    elif one != other:
        yield Difference(key, one, other)


def _shown(value: Any) -> str:
    """Return a value as a config writes it, without the secrets of URLs; a long value is cut."""
    plain = to_jsonable_python(value)
    text = plain if isinstance(plain, str) else json.dumps(plain)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _is_list_of_sections(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, BaseModel) for item in value)
