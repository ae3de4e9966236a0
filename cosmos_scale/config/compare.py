"""Which keys differ between two configs and may not: a checkpoint's and the resuming run's, or those of two hosts."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from cosmos_scale.config import RunConfig
from cosmos_scale.config.section import MAY_DIFFER_BY_HOST, RESUME_MAY_CHANGE, has_mark
from cosmos_scale.words import counted

_LONGEST = 80  # characters of a value in a message
_BEFORE = 20  # characters that are shown before the place where two long values differ


class Difference(NamedTuple):
    """A dotted key that two configs have different values of: `one` in the first config, `other` in the second.

    inner: of lists of sections with unequal lengths the first difference between two sections at one place, if any.
    """

    key: str
    one: Any
    other: Any
    inner: "Difference | None" = None

    def __str__(self) -> str:
        """Return the key with the second config's value, and the first config's value as the former one.

        Of long lists only what differs first is shown, by its place.
        """
        now, former = to_jsonable_python(self.other), to_jsonable_python(self.one)
        if isinstance(now, list) and isinstance(former, list) and max(len(_text(now)), len(_text(former))) > _LONGEST:
            inner = self.inner
            if not _is_list_of_sections(self.one):
                unequal = (place for place, pair in enumerate(zip(now, former, strict=False)) if pair[0] != pair[1])
                inner = next((Difference(f"{self.key}.{place}", former[place], now[place]) for place in unequal), None)
            return _of_lists(self.key, now, former, inner)
        return f"{self.key}: {_beside(now, former)}, was {_beside(former, now)}"


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
    elif _is_list_of_sections(one) and _is_list_of_sections(other):
        places = enumerate(zip(one, other, strict=False))
        at_places = (found for place, items in places for found in _differences(*items, mark, f"{key}.{place}"))
        yield Difference(key, one, other, next(at_places, None))
    elif one != other:
        yield Difference(key, one, other)


def _of_lists(key: str, now: Sequence[Any], former: Sequence[Any], inner: Difference | None) -> str:
    """Return what differs between two lists: their lengths, and the first entries at one place that do, if any do."""
    lengths = f"{key}: {counted(len(now), 'entry', 'entries')}, was {len(former)}"
    if inner is not None:
        return str(inner) if len(now) == len(former) else f"{lengths}; the first that differs is {inner}"
    both = min(len(now), len(former))
    longer, what = (now, "new") if len(now) > both else (former, "gone")
    return f"{lengths}; the first that is {what} is {key}.{both}: {_cut(_text(longer[both]))}"


def _beside(plain: Any, other: Any) -> str:
    """Return a value as a config writes it; of a long one the part where it begins to differ from the other one."""
    text = _text(plain)
    pairs = enumerate(zip(text, _text(other), strict=False))
    same = next((place for place, (one, two) in pairs if one != two), len(text))
    return _cut(text, max(0, same - _BEFORE) if same > _LONGEST - _BEFORE else 0)


def _cut(text: str, start: int = 0) -> str:
    """Return at most _LONGEST characters of a text, from a place on, with dots for those that are not shown."""
    if len(text) <= _LONGEST:
        return text
    text = f"...{text[start:]}" if start else text
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _text(plain: Any) -> str:
    """Return a value, of which secrets of URLs were left out, as a config writes it."""
    return plain if isinstance(plain, str) else json.dumps(plain)


def _is_list_of_sections(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, BaseModel) for item in value)
