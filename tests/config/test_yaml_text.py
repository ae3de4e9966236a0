"""YAML that Python cannot hold is the user's error."""

from pathlib import Path

import pytest

from cosmos_scale.config.load import load_config
from cosmos_scale.config.yaml_text import parse_yaml
from cosmos_scale.errors import UserError


def test_a_number_of_too_many_digits_is_refused() -> None:
    with pytest.raises(UserError, match=r"^run\.yaml: is not valid YAML: Exceeds the limit"):
        parse_yaml(f"seed: {'9' * 5000}", "run.yaml")


def _bomb(value: str, levels: int) -> str:
    """A text whose last value holds 9 ** levels values, in a few hundred bytes."""
    lines = ["k0: &k0 {x: 1}"]
    for level in range(1, levels):
        aliases = ", ".join([f"*k{level - 1}"] * 9)
        lines.append(f"k{level}: &k{level} {value % aliases}")
    return "\n".join(lines)


@pytest.mark.parametrize("value", ["[%s]", "{<<: [%s]}", "{a: [%s]}"])
def test_aliases_do_not_multiply_beyond_memory(value: str) -> None:
    assert parse_yaml(_bomb(value, 4), "run.yaml")
    with pytest.raises(
        UserError, match=r"^run.yaml: holds more than 100,000 values, its aliases counted; rule: "
    ) as error:
        parse_yaml(_bomb(value, 20), "run.yaml")
    assert "\n" not in str(error.value)


def test_what_stands_behind_too_many_values_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosmos_scale.config.yaml_text.MOST_VALUES", 100)
    with pytest.raises(UserError, match=r"^run.yaml: holds more than 100 values, "):
        parse_yaml("eval:\n" + "- {kind: retrieval}\n" * 100 + "- ]no yaml\n", "run.yaml")
    with pytest.raises(UserError, match=r"^run.yaml: line 12 is not valid YAML: "):
        parse_yaml("eval:\n" + "- {kind: retrieval}\n" * 10 + "- ]no yaml\n", "run.yaml")


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 3000, "- " * 5000 + "1", "[" * 60 + "]" * 60, "&a [1, *a]"])
def test_what_lies_too_deep_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"^run.yaml: a value holds itself, or lies too deep; rule: ") as error:
        parse_yaml(text, "run.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sign", list("*&!%@`"))
def test_a_value_that_begins_with_a_sign_of_yaml_is_told_to_stand_in_quotes(sign: str) -> None:
    for text in (f"data:\n  shards: {sign}x/y.tar\n", f"- {sign}.tar\n", f"shards: [a, {sign}.tar ]\n"):
        with pytest.raises(UserError, match=r"^run\.yaml: line \d is not valid YAML: ") as error:
            parse_yaml(text, "run.yaml")
        assert str(error.value).endswith(f"; rule: a value that begins with {sign} stands in quotes")
    quoted = f"'{sign}x/y.tar'"
    assert parse_yaml(f"shards: {quoted}", "run.yaml") == {"shards": f"{sign}x/y.tar"}


INSIDE = (
    "[ ] and { } are closed, commas stand between their entries, and a value with braces, brackets or ${NAME} stands "
    "in quotes there"
)
COLUMNS = "keys that belong together begin in one column, each with a colon and a blank behind it"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("shards: [${X}/a.tar]", INSIDE),
        ("{shards: ${X}/a.tar}", INSIDE),
        ("shards: {a,b}.tar", "a value that begins with [ or { stands in quotes"),
        ("shards: | x", "a value that begins with | or > stands in quotes"),
        ("name: a: b", "a value that holds a colon and a blank stands in quotes"),
        ("name: a\nshards: 'x\n", "the quote that opens on line 2 is closed"),
        ('shards: "C:\\data"', "a value with backslashes stands in single quotes"),
        ("data:\n  shards: [a, b\n", INSIDE),
        ("sources: [{name: a}\n  {name: b}]", INSIDE),
        ("data:\n  a: 1\n   b: 2\n", COLUMNS),
        ("data:\n    a: 1\n  b: 2\n", COLUMNS),
        ("data\n  a: 1\n", COLUMNS),
        ("a:1\nb: 2\n", COLUMNS),
        ("eval:\n  - kind: a\n   every: 5\n", COLUMNS),
        ("seed: \t1", "blanks stand before a key or a value, not tabs"),
        ("data:\n\tshards: x", "blanks stand before a key or a value, not tabs"),
    ],
)
def test_a_syntax_error_says_how_the_value_is_written(text: str, rule: str) -> None:
    with pytest.raises(UserError, match=r"^run\.yaml: line \d is not valid YAML: ") as error:
        parse_yaml(text, "run.yaml")
    assert str(error.value).endswith(f"; rule: {rule}")


@pytest.mark.parametrize("text", ["a: 1\n---\nb: 2\n", "a: 1\n- b\n"])
def test_a_syntax_error_that_no_quotes_mend_gives_no_rule_on_quotes(text: str) -> None:
    with pytest.raises(UserError, match=r"^run\.yaml: line 2 is not valid YAML: ") as error:
        parse_yaml(text, "run.yaml")
    assert "quotes" not in str(error.value)


@pytest.mark.parametrize("line", ["{key}: #fff", "{key}: &fff", "{key}:"])
@pytest.mark.parametrize("key", ["name", "seed", "precision"])
def test_a_value_that_yaml_takes_for_a_comment_is_told_to_stand_in_quotes(tmp_path: Path, line: str, key: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{line.format(key=key)}\ndata: {{sources: [{{name: a, shards: /x}}]}}\n")
    with pytest.raises(UserError, match=f"{key}: null should be .*; rule: this key must have a value") as error:
        load_config(path)
    assert "in quotes if it begins with # (a comment for YAML) or &" in str(error.value)
