"""Values of overrides and files: texts as they stand, and no number that YAML reads in base 8 or 60."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cosmos_scale.cli.main import main
from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import dump_config, load_config, make_config
from cosmos_scale.config.overrides import override_value
from cosmos_scale.config.yaml_text import parse_yaml, write_yaml
from cosmos_scale.errors import UserError

TEXTS = [
    "/d/run #2", "/d/set #1", "{0..3}.tar", "*.tar", "&x", "!x", "%x", "@x", "`x`", "a: b", "a=b=c", "[a", "a]", "- a",
    " a ", "a\tb", "no", "off", "yes", "true", "1", "007", "1e5", "1:30", "2024-01-01", "~", "größe", 'a"b', "'",
    "日本", '"a', "'a\"", "null.tar", "|", ">", "? a", "a,b", "#",
]  # fmt: skip


def refusal(override: str) -> str:
    with pytest.raises(UserError) as caught:
        make_config({}, [override])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "key",
    [
        *("output", "name", "resume", "init_from", "precision", "data.sources.0.shards", "data.sources.11.index"),
        *("data.remote.cache", "eval.0.captions", "eval.retrieval.shards", "log.wandb.project", "log.wandb.mode"),
    ],
)
def test_a_key_of_text_takes_its_text_as_it_stands(key: str, text: str) -> None:
    assert override_value(key, text, key) == text


def test_texts_come_through_to_the_config(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {sources: [{name: a, shards: x}]}\n")
    config = load_config(
        file, ["output=/d/run #2", "name=007", "data.sources.0.shards={0..3}.tar", "optimizer.gradient_scale=true"]
    )
    assert (config.output, config.name, config.data.sources[0].shards) == (Path("/d/run #2"), "007", "{0..3}.tar")
    assert config.optimizer.gradient_scale == "true"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text[0] not in "'\""))
def test_any_text_is_taken_as_it_stands(text: str) -> None:
    assert override_value("output", text, "output") == text


@pytest.mark.parametrize(
    ("text", "value"), [("'a b'", "a b"), ('"a\\tb"', "a\tb"), ("''", ""), ("'null'", "null"), ("'a' 'b'", "'a' 'b'")]
)
def test_quotes_around_a_text_are_yaml_s(text: str, value: str) -> None:
    assert override_value("init_from", text, "init_from") == value


def test_null_and_nothing() -> None:
    for text in ("null", ""):
        assert override_value("init_from", text, "init_from") is None
        assert override_value("train.max_steps", text, "train.max_steps") is None
    assert make_config({"init_from": "a"}, ["init_from=null"]).init_from is None
    assert make_config({}, ["name=null"]).name == "null"
    assert refusal("output=") == "command line: output: nothing stands behind the =; rule: this key must have a value"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epochs=010", 'train.epochs: "010" should be a valid integer; rule: a number has neither leading zeros'),
        ("train.epochs=1:30", 'train.epochs: "1:30" should be a valid integer; rule: a number has neither'),
        ("seed=-010", 'seed: "-010" should be a valid integer; rule: '),
        ("optimizer.lr=1:30.5", 'optimizer.lr: "1:30.5" should be a valid number; rule: '),
        ("train.epochs=1e2", "train.epochs: 100.0 should be a valid integer"),
        ("train.epochs=5 #2", 'train.epochs: "5 #2" should be a valid integer'),
        ("train.epochs=yes", "train.epochs: true should be a valid integer"),
        ("data.views.flip=on", "data.views.flip: true should be a valid number"),
        ("zero.stage=off", "zero.stage: false should be a valid integer"),
        ("zero.stage=1.0", "zero.stage: 1.0 should be a valid integer"),
        ("zero.stage=02", 'zero.stage: "02" should be 0, 1, 2 or 3'),
        ("log.progress=1", "log.progress: 1 should be a valid boolean"),
        ("optimizer.betas=[0.9, 1:30]", 'optimizer.betas.1: "1:30" should be a valid number; rule: '),
    ],
)
def test_no_number_changes_without_a_word(override: str, said: str) -> None:
    assert refusal(override).startswith(f"command line: {said}")
    key, _, text = override.partition("=")
    if "#" not in text:  # in a file it begins a comment
        nested: Any = parse_yaml(text, key)
        for name in reversed(key.split(".")):
            nested = {name: nested}
        with pytest.raises(UserError, match="should be"):
            make_config(nested)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("10", 10), ("0", 0), ("-3", -3), ("+3", 3), ("2_823_019", 2823019), ("0x10", 16), ("0b11", 3)),
        *(("1e-4", 1e-4), ("1E-4", 1e-4), ("1.5e3", 1500.0), ("1.e-4", 1e-4), (".5e3", 500.0), ("-.5", -0.5)),
        *(("5e4", 5e4), ("+1e4", 1e4), ("1_0.5", 10.5), ("1.", 1.0), ("007.5", 7.5), (".inf", float("inf"))),
    ],
)
def test_numbers_are_those_that_people_mean(text: str, number: float) -> None:
    value = parse_yaml(text, "x")
    assert value == number
    assert type(value) is type(number)


@pytest.mark.parametrize(
    "text", ["010", "00", "0_7", "1:30", "1:30:00", "190:20:30.15", "-012", "2024-01-01", "1e", "."]
)
def test_what_only_yaml_reads_as_a_number_is_a_text(text: str) -> None:
    assert parse_yaml(text, "x") == text


def test_a_file_that_gives_no_text_says_that_quotes_make_one(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for written, shown in (
        ("name: no", "name: false"),
        ("name: 2024", "name: 2024"),
        ("precision: on", "precision: true"),
    ):
        file.write_text(f"{written}\n")
        with pytest.raises(UserError) as caught:
            load_config(file)
        assert str(caught.value).startswith(f"{file}: {shown} should be ")
        assert str(caught.value).endswith(
            "; rule: a text that looks like a number, or like yes and no, stands in quotes"
        )


@given(
    st.dictionaries(
        st.text("abc", min_size=1), st.one_of(st.text(), st.from_regex(r"[-+0-9.e:_xb]+"), st.floats(allow_nan=False))
    )
)
def test_what_is_written_is_read_back_by_us_and_by_others(tree: dict[str, Any]) -> None:
    assert parse_yaml(write_yaml(tree), "x") == tree
    assert yaml.safe_load(write_yaml(tree)) == tree


def test_a_dumped_name_like_a_number_stays_a_name(tmp_path: Path) -> None:
    for name in ("1e5", "007", "1.5e3", "no", "1_0"):
        file = tmp_path / "config.yaml"
        file.write_text(dump_config(RunConfig(name=name)))
        assert load_config(file).name == name
        assert json.dumps(yaml.safe_load(file.read_text())["name"]) == json.dumps(name)


def test_a_key_of_too_many_levels_is_refused() -> None:
    with pytest.raises(UserError, match=r"^command line: .*no such key; rule: at most 50 levels$"):
        make_config({}, [".".join(["a"] * 10_000) + "=1"])


def test_an_override_without_a_value_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """As where a shell's variable is not set: the run would draw its weights instead of taking those asked for."""
    assert main(["train", "cc3m_vitb16", "init_from=", "seed=none", "--dry-run"]) == 2
    assert "init_from= stands without a value, which means null\n" in capsys.readouterr().err
