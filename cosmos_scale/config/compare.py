"""Which keys differ between two configs and may not: a checkpoint's and the resuming run's, or those of two hosts."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from cosmos_scale.config import RunConfig
from cosmos_scale.config.section import MAY_DIFFER_BY_HOST, RESUME_MAY_CHANGE, has_mark


def changed_on_resume(old: RunConfig, new: RunConfig) -> list[str]:
    """Return the dotted keys that differ between a checkpoint's config and the resuming run's, and may not."""
    return list(_differences(old, new, RESUME_MAY_CHANGE, ""))


def different_between_hosts(one: RunConfig, other: RunConfig) -> list[str]:
    """Return the dotted keys that differ between two hosts of one run, and may not."""
    return list(_differences(one, other, MAY_DIFFER_BY_HOST, ""))


def _differences(one: Any, other: Any, mark: dict[str, Any], key: str) -> Iterator[str]:
    """Yield the keys, below a key, that differ and whose fields lack the mark; sections and lists are looked into."""
    if isinstance(one, BaseModel) and type(one) is type(other):
        for name, field in type(one).model_fields.items():
            if not has_mark(field, mark):
                inner = f"{key}.{name}" if key else name
                yield from _differences(getattr(one, name), getattr(other, name), mark, inner)
    elif _is_list_of_sections(one) and _is_list_of_sections(other) and len(one) == len(other):
        for position, (one_item, other_item) in enumerate(zip(one, other, strict=True)):
            yield from _differences(one_item, other_item, mark, f"{key}.{position}")
    elif one != other:
        yield key


def _is_list_of_sections(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, BaseModel) for item in value)
