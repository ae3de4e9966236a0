"""The names of all config keys, the sections that hold them, and the nearest valid key to a wrong one."""

import difflib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel

from cosmos_scale.config import RunConfig


class PlacedSection(NamedTuple):
    """A section and its dotted place in a run: "" for the run itself; an element of a list has the name `N`."""

    place: str
    type: type[BaseModel]

    def key(self, name: str) -> str:
        """Return the dotted key of one of the section's fields."""
        return f"{self.place}.{name}" if self.place else name


def sections(root: type[BaseModel] = RunConfig, place: str = "") -> Iterator[PlacedSection]:
    """Yield a section and all sections below it. A section comes before the sections inside it.

    A place may have sections of several types.
    """
    here = PlacedSection(place, root)
    yield here
    for name, field in root.model_fields.items():
        for inner, in_list in sections_in(field.annotation):
            yield from sections(inner, here.key(f"{name}.N" if in_list else name))


def sections_in(annotation: Any) -> Iterator[tuple[type[BaseModel], bool]]:
    """Yield the section types inside a field's annotation, and whether they are elements of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, False
        return
    in_list = get_origin(annotation) is tuple
    for argument in get_args(annotation):
        for section, nested in sections_in(argument):
            yield section, nested or in_list


def valid_keys(kind: str = "") -> list[str]:
    """Return every dotted key of a run, sections included; an element of a list has the name `N`.

    kind: of a list's elements that have kinds, such as the evaluators, only those of this kind count; "": all.
    """
    keys = (
        section.key(name)
        for section in sections()
        if not kind or kind_of(section.type) in ("", kind)
        for name in section.type.model_fields
    )
    return list(dict.fromkeys(keys))


def kind_of(section: type[BaseModel]) -> str:
    """Return the kind of a section that is one of several kinds of element of a list; "" for every other section."""
    field = section.model_fields.get("kind")
    return get_args(field.annotation)[0] if field is not None and get_origin(field.annotation) is Literal else ""


def with_positions_named(dotted: str) -> str:
    """Return a dotted key with `N` for each position in a list: data.sources.0.shards is data.sources.N.shards."""
    return ".".join("N" if part.isdecimal() else part for part in dotted.split("."))


def nearest_key(dotted: str, kind: str = "") -> str:
    """Return the valid dotted key that is most like a wrong one; kind: as in `valid_keys`.

    The first choice is a key of the same section with a similar name, the second a key of another section with the same
    last name (`lr` -> `optimizer.lr`), the third the most similar key of all.
    """
    parts = dotted.split(".")
    pattern = with_positions_named(dotted)
    section, _, name = pattern.rpartition(".")
    keys = valid_keys(kind)
    neighbours = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == section}
    namesakes = [key for key in keys if key.rpartition(".")[2] == name]
    if slips := difflib.get_close_matches(name, neighbours, n=1, cutoff=0.6):
        nearest = neighbours[slips[0]]
    elif namesakes:
        nearest = difflib.get_close_matches(pattern, namesakes, n=1, cutoff=0.0)[0]
    else:
        nearest = difflib.get_close_matches(pattern, keys, n=1, cutoff=0.0)[0]
    # The positions in lists that the wrong key has replace `N` again.
    nearest_parts = nearest.split(".")
    return ".".join(
        parts[place] if part == "N" and place < len(parts) and parts[place].isdecimal() else part
        for place, part in enumerate(nearest_parts)
    )
