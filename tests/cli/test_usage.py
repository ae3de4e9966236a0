"""What a command line says of itself: an unknown option with the usage of its command, a key that is given twice."""

import pytest

from cosmos_scale.cli import main as cli

CALLS = [
    ("data index", "shards"),
    ("checkpoint inspect", "runs"),
    ("eval retrieval", "--checkpoint a --data b"),
    ("eval all", "--checkpoint a --data-root b"),
    ("convert", "--checkpoint a --to hf b"),
    ("attention", "--checkpoint a --out b"),
    ("report", "runs"),
    ("setup", ""),
    ("configs", ""),
]


@pytest.mark.parametrize(("command", "arguments"), CALLS)
def test_an_unknown_option_is_refused_with_the_usage_of_its_command(
    command: str, arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), *arguments.split(), "--unknown"])
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"usage: cosmos-scale {command} ")
    assert errors.endswith(f"cosmos-scale {command}: error: unrecognized arguments: --unknown\n")


def test_the_last_of_two_overrides_counts_which_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["seed=3", "seed=3", "train.max_steps=1", "seed=none"]
    assert cli.main(["train", "cc3m_vitb16", *overrides, "--dry-run"]) == 2
    errors = capsys.readouterr().err
    assert "seed is given 3 times (3, 3, none): none counts\n" in errors
    assert "max_steps is given" not in errors


def test_a_range_that_the_shell_has_parted_is_said_on_a_short_line(capsys: pytest.CaptureFixture[str]) -> None:
    """bash makes hundreds of overrides of shards=/data/{00000..00331}.tar, of which the last counts."""
    parted = [f"data.sources.0.shards=/data/{number:05d}.tar" for number in range(332)]
    assert cli.main(["train", "cc3m_vitb16", *parted, "seed=none"]) == 2
    assert (
        "data.sources.0.shards is given 332 times (/data/00000.tar, /data/00001.tar, ..., /data/00331.tar): "
        "/data/00331.tar counts; braces need quotes, or the shell parts them\n"
    ) in capsys.readouterr().err
