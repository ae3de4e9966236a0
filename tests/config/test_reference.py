"""The reference of all keys: complete, up to date, and readable in a terminal of 80 columns."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from cosmos_scale.cli import main as cli
from cosmos_scale.config.keys import PlacedSection, sections, valid_keys
from cosmos_scale.config.reference import describe, help_keys, markdown, type_in_words
from cosmos_scale.config.section import MAY_DIFFER_BY_HOST, RESUME_MAY_CHANGE, Fraction, Place, Range, Section
from cosmos_scale.errors import UserError
from tests.conftest import REPOSITORY


class Cats(Section):
    """Counts cats."""

    kind: Literal["cats"] = Field("cats", description="which section this is")
    every: int = Field(5, gt=0, description="steps | hours", json_schema_extra=RESUME_MAY_CHANGE)


class Dogs(Section):
    """Counts dogs."""

    kind: Literal["dogs"] = Field("dogs", description="which section this is")
    folder: Path = Field(description="folder of the dogs", json_schema_extra=MAY_DIFFER_BY_HOST)


class Zoo(Section):
    """A run of animals."""

    animals: tuple[Annotated[Cats | Dogs, Field(discriminator="kind")], ...] = ()


def test_the_file_is_up_to_date() -> None:
    written = (REPOSITORY / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == markdown(), "run: make docs"


@pytest.mark.parametrize("section", list(sections()), ids=lambda section: section.place or "run")
def test_every_key_is_explained(section: PlacedSection) -> None:
    for key in describe(section):
        assert len(key.meaning) >= 10, f"{key.key}: give it a description"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("seed", ["whole number from 0 to 9223372036854775807", "0"]),
        ("precision", ["bf16, fp32 or fp16", "bf16"]),
        ("output", ["path", "runs"]),
        ("data.samples", ["whole number of at least 1, or null", "null"]),
        ("data.views.ratio", ["list of 2, each number", "[0.75, 1.33333]"]),
        ("optimizer.lr", ["number above 0", "0.0005"]),
        ("optimizer.betas", ["list of 2, each number from 0 to 1", "[0.9, 0.98]"]),
        ("zero.stage", ["0, 1, 2 or 3", "1"]),
        ("zero.offload", ["true or false", "false"]),
        ("data.sources", ["list, each section", "[]"]),
        ("data.sources.N.shards", ["path, URL or command", "required"]),
        ("data.sources.N.index", ["path, URL or command, or null", "null"]),
        ("data.remote", ["section", ""]),
        ("eval", ["list, each section", "[]"]),
    ],
)
def test_types_limits_and_defaults_are_in_words(key: str, words: list[str]) -> None:
    found = {said.key: [said.type, said.default] for section in sections() for said in describe(section)}
    assert found[key] == words


def test_limits_of_one_side_and_of_open_ends() -> None:
    assert type_in_words(Annotated[float, Field(gt=0.0, le=1.0)]) == "number above 0 and of at most 1"
    assert type_in_words(Annotated[int, Field(lt=3)]) == "whole number of at most 2"
    assert type_in_words(Fraction | None) == "number from 0 to 1, or null"
    assert type_in_words(tuple[Range, ...]) == "list, each list of 2, each number"
    assert type_in_words(Place) == "path, URL or command"


def test_all_keys_and_marks_stand_in_the_file() -> None:
    tables = markdown().split("\n## ")
    run = next(table for table in tables if table.startswith("The run\n"))
    assert "| `seed` | whole number from 0 to 9223372036854775807 | `0` | seed of every" in run
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == sum(len(section.type.model_fields) for section in sections()) > len(valid_keys())
    (workers,) = (line for line in rows if line.startswith("| `workers` |"))
    assert workers.endswith("| yes | yes |")
    (stage,) = (line for line in rows if line.startswith("| `stage` |"))
    assert stage.endswith("| yes | |")
    (epochs,) = (line for line in rows if line.startswith("| `epochs` |"))
    assert epochs.endswith("| | |")


def test_a_list_of_several_kinds_of_section_is_explained_kind_by_kind() -> None:
    text = markdown(Zoo)
    assert "| `animals` | list, each section | `[]` | Counts cats. Counts dogs. | | |" in text
    cats, dogs = text.split("### `animals.N` ")[1:]
    assert cats.startswith("(kind: cats)\n\nCounts cats.\n")
    assert "| `every` | whole number of at least 1 | `5` | steps \\| hours | yes | |" in cats
    assert dogs.startswith("(kind: dogs)\n\nCounts dogs.\n")
    assert "| `folder` | path | required | folder of the dogs | yes | yes |" in dogs


@pytest.mark.parametrize(
    ("prefix", "shown", "hidden"),
    [
        ("", ["  seed = 0\n", "  data.sources.N.shards (required)\n", "  log.wandb = null\n"], []),
        ("data.sources.0", ["  data.sources.N.name (required)\n"], ["data.remote"]),
        ("data.sources.0.shards", ["path, URL or command; may change on resume; may differ by host\n"], [".index"]),
        ("data.remote.", ["data.remote: How shards", "  data.remote.cache_gb = 100\n"], ["data.workers"]),
        ("train.max", ["  train.max_steps = null\n", "  train.max_minutes = null\n"], ["train.epochs"]),
        ("model.text", ["  model.text.width = 512\n"], ["text_padding", "model.vision"]),
        ("eval", ["  eval = []\n", "  eval.N.every = 0\n", "  eval.N.batch = 64\n"], ["log."]),
    ],
)
def test_a_prefix_selects_keys(prefix: str, shown: list[str], hidden: list[str]) -> None:
    text = help_keys(prefix)
    assert [part for part in shown if part not in text] == []
    assert [part for part in hidden if part in text] == []
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("prefix", "nearest"),
    [("lr", "optimizer.lr"), ("data.sorces", "data.sources"), ("data.sources.0.shard_", "data.sources.0.shards")],
)
def test_an_unknown_prefix_names_the_nearest_key(prefix: str, nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=f"did you mean {nearest}\\?$"):
        help_keys(prefix)
    assert cli.main(["train", "--help-keys", prefix]) == 2
    expected = f"cosmos-scale train: --help-keys {prefix}: no such key; did you mean {nearest}?\n"
    assert capsys.readouterr() == ("", expected)


def test_the_command_line_prints_keys_and_needs_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, prefix in (([], ""), (["ema"], "ema")):
        assert cli.main(["train", "--help-keys", *arguments]) == 0
        assert capsys.readouterr().out == help_keys(prefix) + "\n"
