"""What a command is told to do and does not know is refused with the usage of that command, not of the program."""

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
