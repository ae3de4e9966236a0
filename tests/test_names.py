"""One meaning a name: a public class, function or type at the top of a module is defined in one module only."""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.test_imports import own_sources, source_id

# Names that several modules define on purpose.
PROTOCOLS = {
    "main",  # what a program runs, under the name that Python's own tools use
}


def defined(node: ast.stmt) -> Iterator[str]:
    """The public name that a statement defines: of a class, a function or a type (Pixels = ...; a TypeVar is none)."""
    name = ""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        name = node.name
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        is_variable = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "TypeVar"
        name = "" if is_variable or node.targets[0].id.isupper() else node.targets[0].id
    if name and not name.startswith("_"):
        yield name


def repeated_names(paths: Iterable[Path]) -> dict[str, list[str]]:
    """The modules of every public name that more than one of some modules defines."""
    places = defaultdict(list)
    for path in paths:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for name in defined(node):
                places[name].append(source_id(path))
    return {name: modules for name, modules in places.items() if len(modules) > 1}


def test_public_names_are_defined_once() -> None:
    repeated = {name: modules for name, modules in repeated_names(own_sources()).items() if name not in PROTOCOLS}
    assert repeated == {}


def test_a_planted_second_meaning_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_imports.REPOSITORY", tmp_path)
    planted = [tmp_path / "one.py", tmp_path / "two.py"]
    for path in planted:
        path.write_text("class Table:\n    def show(self): ...\nRows = list[int]\nMANY = 3\ndef _private(): ...\n")
    assert repeated_names(planted) == {"Table": ["one.py", "two.py"], "Rows": ["one.py", "two.py"]}


def test_the_sources_are_all_there() -> None:
    assert REPOSITORY / "cosmos_scale" / "files.py" in own_sources()
    assert REPOSITORY / "kernels" / "attention.py" in own_sources()
