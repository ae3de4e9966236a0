"""A library that cannot be imported, often for an odd variable of its own: one line, in every program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_scale.cli import main as cli
from cosmos_scale.interrupt import refused_import
from tests.conftest import REPOSITORY

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("command", "variables", "line"),
    [
        (
            "cosmos_scale.cli train",
            {"TORCH_LOGS": "nothing_of_torch"},
            "cosmos-scale train: torch: cannot be imported: ValueError: Invalid log settings: nothing_of_torch",
        ),
        # A second import, to see whether the error is a lost rank's, would abort the process.
        (
            "cosmos_scale.cli train",
            ALONE | {"TORCH_DISTRIBUTED_DEBUG": "LOUD"},
            "cosmos-scale train: torch: cannot be imported: ValueError: The value of TORCH_DISTRIBUTED_DEBUG must be",
        ),
        (
            "cosmos_scale.train",
            {"TORCH_DISTRIBUTED_DEBUG": "LOUD"},
            "cosmos-scale train: torch: cannot be imported: ValueError: The value of TORCH_DISTRIBUTED_DEBUG must be",
        ),
    ],
)
def test_a_variable_that_torch_refuses_is_one_line(
    tmp_path: Path, command: str, variables: dict[str, str], line: str
) -> None:
    (tmp_path / "run.yaml").write_text("name: r\n")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    ended = subprocess.run(
        [sys.executable, "-m", *command.split(), "run.yaml"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith(line)
    (name,) = variables.keys() - ALONE.keys()
    assert "; rule: look at its variables, of which are set: " in ended.stderr
    assert name in ended.stderr.partition("; rule: ")[2]
    assert ended.stderr.count("\n") == 1


def test_load_is_refused_as_everything_that_a_user_can_mend() -> None:
    code = "try: cosmos_scale.load\nexcept cosmos_scale.UserError as error: print(error)"
    ended = subprocess.run(
        [sys.executable, "-c", f"import cosmos_scale\n{code}"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TORCH_LOGS": "nothing_of_torch"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.stderr, ended.returncode) == ("", 0)
    assert ended.stdout.startswith("torch: cannot be imported: ValueError: Invalid log settings: nothing_of_torch")
    assert ended.stdout.endswith("; rule: look at its variables, of which are set: TORCH_LOGS\n")


def test_only_a_librarys_own_import_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "brittle_library.py").write_text("def work():\n    1 / 0\nimport os\nos.environ['BRITTLE'] or work()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("BRITTLE", "")

    def command() -> int:
        import brittle_library  # type: ignore[import-not-found]

        brittle_library.work()
        return 0

    assert cli.exit_status("cosmos-scale data", command) == 2
    assert capsys.readouterr().err == (
        "cosmos-scale data: brittle_library: cannot be imported: ZeroDivisionError: division by zero; rule: look at "
        "its installation\n"
    )
    monkeypatch.setenv("BRITTLE", "no")
    with pytest.raises(ZeroDivisionError) as raised:  # of its work, once it is there
        cli.exit_status("cosmos-scale data", command)
    assert refused_import(raised.value) is None
