"""The names of all config keys, and the nearest valid one to a wrong one."""

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from cosmos_scale.config import RunConfig


def valid_keys() -> list[str]:
    """Return every dotted key of a run, sections included; an element of a list has the name `N`."""
    return list(_keys_of(RunConfig, ""))


def nearest_key(dotted: str) -> str:
    """Return the valid dotted key that is most like a wrong one.

    A neighbour in the same section that differs by a slip comes first, then a key of the same last name elsewhere
    (`lr` -> `optimizer.lr`), then whatever reads most alike.
    """
    parts = dotted.split(".")
    pattern = ".".join("N" if part.isdecimal() else part for part in parts)
    section, _, name = pattern.rpartition(".")
    keys = valid_keys()
    neighbours = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == section}
    namesakes = [key for key in keys if key.rpartition(".")[2] == name]
    if slips := difflib.get_close_matches(name, neighbours, n=1, cutoff=0.6):
        nearest = neighbours[slips[0]]
    elif namesakes:
        nearest = difflib.get_close_matches(pattern, namesakes, n=1, cutoff=0.0)[0]
    else:
        nearest = difflib.get_close_matches(pattern, keys, n=1, cutoff=0.0)[0]
    # Positions in lists come back where they stood.
    nearest_parts = nearest.split(".")
    return ".".join(
        parts[place] if part == "N" and place < len(parts) and parts[place].isdecimal() else part
        for place, part in enumerate(nearest_parts)
    )


def _sections(annotation: Any) -> Iterator[tuple[type[BaseModel], bool]]:
    """Yield the section classes inside an annotation, and whether they are elements of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, False
        return
    in_list = getattr(annotation, "__origin__", None) is tuple
    for argument in get_args(annotation):
        for section, nested in _sections(argument):
            yield section, nested or in_list


def _keys_of(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for inner, in_list in _sections(field.annotation):
            yield from _keys_of(inner, f"{prefix}{name}.N." if in_list else f"{prefix}{name}.")
