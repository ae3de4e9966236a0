"""The JSON files beside the tensors of a folder: read, and compared with what the tensors tell and our towers do."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_scale.batch import MEAN, STD
from cosmos_scale.checkpoint.interchange.weights import Activation, refusal
from cosmos_scale.files import load_json, read_regular, reason_of


class Stated(NamedTuple):
    """A number that a config states: its key, its value, None where it is not stated, and what the tensors tell."""

    key: str
    value: Any
    found: int


def read_settings(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; raises UserError where it is none."""
    try:
        content = load_json(read_regular(path))
    except OSError as error:
        raise refusal(path, f"cannot be read: {reason_of(error)}") from error
    except ValueError as error:
        raise refusal(path, f"found no JSON ({error})") from error
    if not isinstance(content, dict):
        raise refusal(path, f"found a JSON {type(content).__name__}, not an object")
    return content


def object_of(path: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return an object inside an object of a JSON file, empty where it is not there; raises UserError."""
    value = content.get(key)
    if value is not None and not isinstance(value, dict):
        raise refusal(path, f"found {key} {value!r}, not an object")
    return dict(value or {})


def stated_count(path: Path, key: str, value: Any) -> int:
    """Return a value that must be a whole number above 0; raises UserError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refusal(path, f"found {key} {value!r}, not a whole number above 0")
    return value


def compare(path: Path, stated: Iterable[Stated]) -> None:
    """Raise UserError where a config states other numbers than its tensors tell; path: of the config."""
    for key, value, found in stated:
        sides = value if isinstance(value, list) else [value]
        if value is not None and any(side != found for side in sides):
            raise refusal(path, f"found {key} {value}, but tensors of {found}")


def check_pixels(path: Path, mean: Any, deviation: Any) -> None:
    """Raise UserError where pixels are to be normalised otherwise than ours; None: not stated. path: of the config."""
    for key, value, ours in (("mean", mean, MEAN), ("std", deviation, STD)):
        if value is None:
            continue
        numbers = [side for side in value if isinstance(side, (int, float))] if isinstance(value, list) else []
        if len(numbers) != 3 or any(abs(side - own) > 1e-4 for side, own in zip(numbers, ours, strict=True)):
            raise refusal(path, f"found pixels normalised by {key} {value}, not by CLIP's {list(ours)}")


def other_pictures(path: Path, stated: Mapping[str, Any], ours: Mapping[str, tuple[Any, ...]]) -> tuple[str, ...]:
    """Return what is assumed where a config has pictures prepared otherwise than ours: a line, or none.

    ours: the values of each key that mean what we do; None: not stated. path: of the config. Some published models were
    trained on pictures that are squashed to a square, say: their numbers here are not those of their own program.
    """
    others = [f"{key} {stated[key]!r}" for key, usual in ours.items() if stated.get(key) not in (None, *usual)]
    if not others:
        return ()
    how = "pictures: normalised, resized by their shorter side, bicubic, and cut to their middle"
    return (f"{how} (though {path.name} says {', '.join(others)})",)


def other_weights(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Return what is assumed where a folder has several files of weights: a line, or none.

    names: of the files that may be there; the first that is there is read. A training that went on may have written
    only one of them anew.
    """
    there = [name for name in names if (folder / name).is_file()]
    if len(there) < 2:
        return ()
    return (f"weights: those of {there[0]} (not read: {', '.join(there[1:])} beside it)",)


def one_activation(path: Path, stated: Activation, asked: Activation | None) -> Activation:
    """Return the activation that a config states; raises UserError where another was asked for."""
    if asked not in (None, stated):
        raise refusal(path, f"found activation {stated}, but {asked} was asked for")
    return stated
