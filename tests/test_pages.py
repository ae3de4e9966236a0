"""README.md and docs/: commands that are understood, keys and links that exist, and the order of a user's day."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cosmos_scale.cli import main as cli
from cosmos_scale.config.keys import valid_keys, with_positions_named
from cosmos_scale.config.shipped import is_shipped_run
from cosmos_scale.data.samples.caption_keys import OTHER_NAMES
from cosmos_scale.data.tools.captions_file import IMAGE_COLUMNS
from tests.conftest import REPOSITORY

README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
MISTAKE = "train my_run.yaml train.epoch=4"  # shown with its refusal
PLACEHOLDER = re.compile(r" \.\.\.|\[|<")  # a command that is no whole one


def blocks(page: Path) -> Iterator[str]:
    """The lines of code of a page, fenced or indented, with continued lines put together."""
    text = page.read_text(encoding="utf-8")
    for match in FENCED.finditer(text):
        yield match[2].replace("\\\n", " ")
    outside = FENCED.sub("", text)
    yield "\n".join(line[4:] for line in outside.replace("\\\n", " ").splitlines() if line.startswith("    "))


def commands(page: Path) -> list[str]:
    """The commands of the page's code that are this program's."""
    lines = [line for block in blocks(page) for line in block.splitlines()]
    found = [match[1] for line in lines if (match := re.match(r"(?:\$ )?cosmos-scale ((?!\w+:|\w+ \w+:).*)", line))]
    return [command for command in found if not PLACEHOLDER.search(command) and command != MISTAKE]


def headings(page: Path) -> list[str]:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"^#+ (.*)$", text, re.MULTILINE)


def anchor(heading: str) -> str:
    """The name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_understood(page: Path) -> None:
    """Options exist, keys too, and so do the runs that are named without a file."""
    for command in commands(page):
        arguments = cli._parse(shlex.split(command, comments=True))
        for override in getattr(arguments, "overrides", ()):
            key = with_positions_named(override.partition("=")[0])
            assert key in valid_keys() or override.endswith(".yaml"), command
        run = getattr(arguments, "file", None)
        if run is not None and Path(str(run)).suffix != ".yaml":
            assert is_shipped_run(str(run)), command


def test_commands_are_found() -> None:
    assert len([command for page in PAGES for command in commands(page)]) > 60
    assert commands(README)[0].startswith("setup")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for match in LINK.finditer(text):
        target, _, part = (match[1] or match[2]).partition("#")
        if re.match(r"\w+:", target):
            continue
        file = page.parent / target if target else page
        assert file.exists(), match[0]
        if part:
            assert part in {anchor(heading) for heading in headings(file)}, match[0]


def test_every_page_is_named_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in text] == []


def test_the_readme_has_the_order_of_a_day() -> None:
    assert headings(README) == [
        "cosmos-scale",
        "Demo: two commands",
        "In Python: three lines",
        "Your own pictures: five commands",
        "Published data",
        "Many GPUs and hosts",
        "Evaluate",
        "Memory",
        "How it works",
        "What works today",
        "Licence and citation",
    ]


def test_the_shown_mistake_is_refused_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["configs", "--write", "own_pictures", "my_run.yaml"]) == 0
    assert cli.main(shlex.split(MISTAKE)) == 2
    assert f"$ cosmos-scale {MISTAKE}\n{capsys.readouterr().err}" in README.read_text(encoding="utf-8")


def test_the_small_run_of_the_readme_is_the_shipped_one() -> None:
    (shown,) = [match[2] for match in FENCED.finditer(README.read_text(encoding="utf-8")) if match[1] == "yaml"]
    shipped = REPOSITORY / "configs" / "run" / "own_pictures.yaml"
    assert yaml.safe_load(shown) == yaml.safe_load(shipped.read_text(encoding="utf-8"))
    explained = [line for line in shown.splitlines() if "#" in line]
    assert len(explained) > len(shown.splitlines()) // 3


def test_the_readme_names_columns_clone_licence_and_citation() -> None:
    text = README.read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w-]+)`", text))
    assert named >= {*IMAGE_COLUMNS, *OTHER_NAMES, "--caption-column", "--image-column", "--key"} - {"image"}
    assert "$ git clone " in text
    assert "MIT, see [LICENSE](LICENSE)" in text
    assert "@inproceedings{kim2025cosmos," in text


def test_the_readme_compares_in_measured_numbers() -> None:
    """What was timed stands on the page of figures too, with the command that measures it."""
    table = README.read_text(encoding="utf-8").partition("| | public implementation |")[2].partition("\n\n")[0]
    page = (REPOSITORY / "docs" / "performance.md").read_text(encoding="utf-8")
    timed = [row for row in table.splitlines() if re.search(r" m?s \||memory", row)]
    assert len(timed) == 4
    for row in timed:
        for number in re.findall(r"\d+\.\d+", row):
            rounded = {number, *(f"{number}0", f"{float(number) - 0.02:.2f}")}
            assert any(re.search(rf"(?<![\d.]){re.escape(form)}(?!\d)", page) for form in rounded), (number, row)
