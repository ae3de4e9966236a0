"""The configs that travel in the package: `extends: cosmos:train/published`, and runs by their bare names."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.errors import UserError
from cosmos_scale.versions import part_of_package

PREFIX = "cosmos:"
SUFFIXES = (".yaml", ".yml")

_FOLDER = part_of_package("configs")
_RUNS = "run/"


class ShippedConfig(NamedTuple):
    """A config of the package. name: what commands take, NAME for a run and cosmos:FOLDER/NAME for a base."""

    name: str
    file: Path
    description: str


class RunFile(NamedTuple):
    """The file that a command takes as its run. said: which file that is, where the user named no file; else empty."""

    file: Path
    said: str


def shipped_configs() -> list[ShippedConfig]:
    """Return all configs of the package, runs first, each with the first line of its comment as its description."""
    found = []
    for name, file in sorted(_files().items(), key=lambda item: (not item[0].startswith(_RUNS), item[0])):
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        shown = name.removeprefix(_RUNS) if name.startswith(_RUNS) else f"{PREFIX}{name}"
        found.append(ShippedConfig(shown, file, first.removeprefix("#").strip()))
    return found


def is_shipped_name(text: str) -> bool:
    """Tell whether a text names a config of the package, rightly or wrongly: it begins with cosmos:."""
    return text.startswith(PREFIX)


def is_shipped_run(text: str) -> bool:
    """Tell whether a text is the bare name of a run of the package."""
    return f"{_RUNS}{text}" in _files()


def shipped_file(text: str) -> Path:
    """Return the file of cosmos:FOLDER/NAME, or of a run's bare name; raises UserError where there is none."""
    files = _files()
    name = text.removeprefix(PREFIX)
    for candidate in (name, name.removesuffix(".yaml"), f"{_RUNS}{name}"):
        if candidate in files:
            return files[candidate]
    raise UserError(
        f"{text}: no config of this name is shipped{_nearest(text, (one.name for one in shipped_configs()))}"
    )


def find_run(text: str) -> RunFile:
    """Return the file of a run: a path, cosmos:FOLDER/NAME, or the bare name of a shipped run.

    A bare name means the shipped run; a file of the current folder is taken by its name with its suffix.
    Raises UserError where there is no such file and no such shipped run.
    """
    if is_shipped_name(text):
        return RunFile(shipped_file(text), "")
    path = Path(text)
    bare = os.sep not in text and path.suffix not in SUFFIXES
    if bare and is_shipped_run(text):
        file = shipped_file(text)
        others = [f"./{text}{suffix}" for suffix in (*SUFFIXES, "") if Path(f"{text}{suffix}").is_file()]
        more = f"; {others[0]} is another file, and is taken by this name" if others else ""
        return RunFile(file, f"{text}: the shipped run, {file}{more}")
    if path.exists():
        return RunFile(path, "")
    if bare:
        raise UserError(f"{text}: no such config file, and no shipped run has this name{_nearest(text, _run_names())}")
    if is_shipped_run(path.stem):
        raise UserError(f"{text}: no such config file; the shipped run of this name is called {path.stem}")
    return RunFile(path, "")  # reading it tells what is wrong


def _files() -> dict[str, Path]:
    return {file.relative_to(_FOLDER).with_suffix("").as_posix(): file for file in sorted(_FOLDER.glob("*/*.yaml"))}


def _run_names() -> list[str]:
    return [name.removeprefix(_RUNS) for name in _files() if name.startswith(_RUNS)]


def _nearest(text: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
    return (
        f"; did you mean {near[0]}? `cosmos-scale configs` lists all" if near else "; `cosmos-scale configs` lists all"
    )
