"""YAML that Python cannot hold is the user's error."""

import pytest

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
