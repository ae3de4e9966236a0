"""Names of classes and templates: those of published sets, and those of users' text files."""

import re
import runpy
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from cosmos_scale.data.samples.file_kind import refuse_no_text
from cosmos_scale.errors import UserError
from cosmos_scale.files import read_regular, reason_of, text_lines, whole_path

Names = tuple[tuple[str, ...], ...]
"""The names of each class, one or more, in the order of the labels."""

# How the published evaluation spells names.
_MISSPELT = {"pets": {"Persian": "Persian'", "Yorkshire Terrier": "Yorkshire Terrie"}}

DEFAULT_TEMPLATES = ("a photo of a {}.",)
CLASS_NAMES_FILE, TEMPLATES_FILE = "classnames.txt", "templates.txt"
_FOLDER = Path(__file__).parent
# What stands beside names in other programs' lists: a number or a wnid before them, or a colour behind them.
_NUMBER = re.compile(r"\W*(?P<number>\d+)\W*[\s:,;.)]\s*(?P<name>\S.*)")
_WNID = re.compile(r"n\d{8}[\s:,;]+(?P<name>\S.*)")
_COLOUR = re.compile(r"(?P<name>.*\S)[\s:,;(\[]+\d{1,3}[\s,;]+\d{1,3}[\s,;]+\d{1,3}[)\]]?")
_BULLET = re.compile(r"\s*[-*\u2022]\s+(?P<name>\S.*)")  # of a list in YAML or Markdown
_LIST = re.compile(r"""\s*\[\s*["'].*["']\s*,?\s*\]\s*""")  # a whole list of texts on one line, as in JSON
# A line of a list in Python: a text in quotes with a comma behind it, or OpenCLIP's form of a template.
_CODE = re.compile(r"""\s*(?:lambda +\w+ *: *f?(?P<template>.+?),?|f?(?P<quoted>'[^']*'|"[^"]*") *,)\s*""")
_PACKAGE, _FILE = "open_clip", "zero_shot_metadata.py"


def published_names(dataset: str, spelling: Literal["corrected", "published"] = "corrected") -> Names:
    """The names of the classes of a set that the published evaluation has, in the order of the set's labels."""
    if dataset == "imagenet":
        return imagenet_names()
    misspelt = _MISSPELT.get(dataset, {}) if spelling == "published" else {}
    lines = (_FOLDER / f"{dataset}.names.txt").read_text(encoding="utf-8").splitlines()
    return tuple((misspelt.get(name, name),) for name in lines)


def published_templates(dataset: str) -> tuple[str, ...]:
    """The templates of a set that the published evaluation has."""
    if dataset == "imagenet":
        return imagenet_templates()
    return tuple((_FOLDER / f"{dataset}.templates.txt").read_text(encoding="utf-8").splitlines())


def imagenet_names() -> Names:
    """The names of ImageNet's 1,000 classes in the order of their sorted wnids, from open-clip-torch."""
    return tuple((name,) for name in _open_clip()["IMAGENET_CLASSNAMES"])


def imagenet_templates() -> tuple[str, ...]:
    """The 80 templates that OpenAI made for ImageNet, with {} for the name, from open-clip-torch."""
    return tuple(template("{}") for template in _open_clip()["OPENAI_IMAGENET_TEMPLATES"])


@lru_cache(maxsize=1)
def _open_clip() -> dict[str, Any]:
    """Read the one file of open-clip-torch that holds names and templates: to import the package takes seconds."""
    package = find_spec(_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise UserError("open-clip-torch: not installed, but its names of ImageNet are needed: pip install it")
    path = Path(package.submodule_search_locations[0]) / _FILE
    if not path.is_file():
        raise UserError(f"{path}: missing, though the installed open-clip-torch should bring ImageNet's names")
    return runpy.run_path(str(path))


def read_names(path: Path, *, several: bool = True) -> Names:
    """Read a file with a line a class: its names, separated by ", ", or, where not several, one name.

    Raises UserError where the file cannot be read, holds nothing, a class has no name, a line is code of Python, or
    numbers stand beside names.
    """
    lines = _lines(path, "a class")
    _refuse_numbers(path, lines)
    names = tuple(tuple(line.split(", ")) if several else (line,) for line in lines)
    for number, of_class in enumerate(names, start=1):
        if not all(map(str.strip, of_class)):
            raise UserError(
                f"{path}: line {number} is {lines[number - 1]!r}, with an empty name beside a comma; rule: names of a "
                "class are separated by a comma and a blank"
            )
    return names


def _refuse_numbers(path: Path, lines: Sequence[str]) -> None:
    """Raise UserError where every line has a number, a wnid, a colour or a bullet beside a name of its own."""
    for form, what in ((_NUMBER, "a number"), (_WNID, "a wnid"), (_COLOUR, "a colour"), (_BULLET, "a bullet")):
        found = [match for line in lines if (match := form.fullmatch(line.strip()))]
        names = {match["name"] for match in found}
        if len(lines) < 2 or len(names) < len(lines):  # "1 apple", "2 apples", "3 apples" are names
            continue
        if form is _NUMBER:
            numbers = {int(match["number"]) for match in found}
            if len(numbers) < len(lines) or min(numbers) > len(lines):  # years and models, not places in a list
                continue
        raise UserError(
            f"{path}: line 1 is {lines[0]!r}, and each line has {what} beside the name, which would become a part of "
            f"the texts; rule: names alone, such as {found[0]['name'].rstrip(',;: ')!r}, in the order of the labels"
        )


def read_templates(path: Path) -> tuple[str, ...]:
    """Read a file with a template a line, {} or {c} for the name; returned with {}.

    Raises UserError where the file cannot be read, holds nothing, or a line is code of Python or has no place for the
    name.
    """
    templates = [line.replace("{c}", "{}") for line in _lines(path, "a template")]
    for number, template in enumerate(templates, start=1):
        if "{}" not in template:
            raise UserError(f"{path}: line {number}: {template!r} has no place for the name; rule: {{}} or {{c}}")
    return tuple(templates)


def filled_in(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return every template with every name, all templates of the first name first."""
    return [template.replace("{}", name) for name in names for template in templates]


def _lines(path: Path, what: str) -> list[str]:
    """Return the lines of a text file, only their ends stripped; empty lines may stand at the end."""
    try:
        refuse_no_text(path)
        text = read_regular(path).decode("utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{whole_path(path)}: cannot be read: {reason_of(error)}; rule: a text file, {what} a line"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: holds bytes that are no UTF-8; rule: a text file, {what} a line") from error
    lines = text_lines(text)
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise UserError(f"{path}: is empty; rule: {what} a line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise UserError(f"{path}: line {number} is empty; rule: {what} a line")
        if "\0" in line:
            raise UserError(
                f"{path}: line {number} holds a NUL: {line[:100]!r}; rule: a text file in UTF-8, {what} a line"
            )
        if _LIST.fullmatch(line):
            raise UserError(
                f"{path}: line {number} is a list, as in JSON: {line[:100]}; rule: {what} a line, without quotes"
            )
        if code := _CODE.fullmatch(line):
            bare = (code["template"] or code["quoted"]).strip("'\"")
            raise UserError(
                f"{path}: line {number} is code of Python: {line[:100]}; rule: {what} a line, here: {bare[:100]}"
            )
    return lines
