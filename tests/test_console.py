"""Consoles print the texts of users as they are: what looks like markup or the name of an emoji is a name or a path."""

import ast
import io
import re
import sys
from pathlib import Path

import pytest
from rich.table import Table

from cosmos_scale.cli.main import main
from cosmos_scale.console import make_console
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.testing.runs import write_run
from cosmos_scale.testing.shard_files import write_shards
from tests.test_imports import SOURCES, source_id

NAMES = ("w[/v2]z", "[red]runs", "a:dog:b", "[/b]", "[link=x]y", "back\\")


@pytest.mark.parametrize("name", NAMES)
def test_names_stand_in_lines_and_tables_as_they_are(name: str) -> None:
    console = make_console()
    console.file = io.StringIO()
    table = Table(name, title=name, caption=name)
    table.add_row(name)
    console.print(name)
    console.print(table)
    assert console.file.getvalue().count(name) == 5


@pytest.mark.parametrize("columns", ["20", "40", "79"])
def test_a_terminal_below_80_columns_gets_the_tables_of_80(
    tmp_path: Path,
    scenes: SceneShards,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: str,
) -> None:
    run = write_run(tmp_path, scenes)
    short = ["data", "inspect", "--rows=1", "--workers=1", "--quiet", str(scenes.train), "--out", str(tmp_path / "out")]
    commands = [short, ["configs"], ["train", "--dry-run", str(run)], ["data", "verify", "--quiet", str(scenes.train)]]
    for command in commands:
        printed = []
        for width in ("80", columns):
            monkeypatch.setenv("COLUMNS", width)
            assert main(command) == 0
            printed.append(re.sub(r"[0-9.]+ free", "", capsys.readouterr().out))
        assert printed[0] == printed[1]


@pytest.mark.parametrize("columns", ["40", "80"])
def test_no_cell_of_a_table_is_cut_off(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    console = make_console()
    console.file = io.StringIO()
    name = "".join(map(str, range(100, 200)))
    table = Table("name", "bytes", "")
    table.add_row(name, "1,234,567,890,123", "BROKEN")
    console.print(table)
    lines = [line.split("\u2502") for line in console.file.getvalue().splitlines() if line.startswith("\u2502")]
    cells = ["".join(line[column].strip() for line in lines) for column in (1, 2, 3)]
    assert cells == [name, "1,234,567,890,123", "BROKEN"]


def test_inspect_shows_names_and_folders_that_look_like_markup(
    tmp_path: Path, scenes: SceneShards, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "w[" / "v2]z"
    folder.parent.mkdir()
    write_shards(folder, [4])
    short = ["data", "inspect", "--rows=1", "--workers=1", "--quiet"]
    assert main([*short, str(folder), "--out", str(tmp_path / "one")]) == 0
    assert "w[/v2]z" in capsys.readouterr().out
    names = ("[/b]", "[red]$s$_$\\x$")  # the picture reads no formula out of dollar signs
    run = write_run(tmp_path, scenes, data={"sources": [{"name": name, "shards": str(folder)} for name in names]})
    assert main([*short, str(run), "--out", str(tmp_path / "two")]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


def test_every_console_is_made_in_one_place() -> None:
    made = {
        source_id(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Console"
    }
    assert made == {"cosmos_scale/console.py"}


class _Unread(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_leaves_early_is_left_to_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich would end the process, with status 1."""
    monkeypatch.setattr(sys, "stdout", _Unread())
    console = make_console()
    with pytest.raises(BrokenPipeError):
        console.print("a table")
