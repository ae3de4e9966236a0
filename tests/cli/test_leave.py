"""The end of a program: its status, what is done before the process ends, and that all programs end so."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# An object of a module is deleted when Python takes the interpreter apart.
PROGRAM = """
import atexit, signal, sys, threading, time
from cosmos_scale.cli.leave import leave_after

class Left:
    def __del__(self): print("taken apart", flush=True)

left = Left()
atexit.register(print, "at exit", end="")  # in the buffer until it is flushed
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()

def main():
    {body}

leave_after(main)
"""


@pytest.mark.parametrize(
    ("body", "status", "errors"),
    [
        ("return 0", 0, ""),
        ("return 141", 141, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit('no')", 1, "no\n"),
        ("raise KeyboardInterrupt", 130, "cosmos-scale: interrupted\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("atexit.register(signal.raise_signal, signal.SIGINT); return 3", 3, ""),  # Ctrl-C while it leaves
        ("atexit.register(lambda: 1 / 0); return 3", 3, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_a_program_keeps_its_status_and_does_what_python_does_at_exit(body: str, status: int, errors: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(body=body)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == status
    assert ended.stdout == "thread\nat exit"
    assert ended.stderr.endswith(errors)
    assert bool(ended.stderr) == bool(errors)


def test_all_programs_end_so() -> None:
    """Ctrl-C is one line. A process whose interpreter is taken apart while gloo's threads run aborts now and then."""
    others = [
        "cosmos_scale/cli/main.py",
        "cosmos_scale/cli/__main__.py",
        "cosmos_scale/train.py",
        "cosmos_scale/profile.py",
        "cosmos_scale/demo.py",
    ]
    files = {REPOSITORY / other for other in others}
    for room in ("benchmarks", "tools"):
        files |= {file for file in (REPOSITORY / room).glob("*.py") if '"__main__"' in file.read_text()}
    assert len(files) > len(others) + 20
    for file in files:
        statements = ast.parse(file.read_text()).body
        mains = [one.body for one in statements if isinstance(one, ast.If) and "'__main__'" in ast.unparse(one.test)]
        last = (mains or [statements])[-1][-1]
        assert ast.unparse(last).startswith(("program()", "leave_after(")), file


@pytest.mark.slow
def test_short_runs_end_with_status_0_where_gloo_is_late(tmp_path: Path) -> None:
    """Of four runs that end by `sys.exit` here about two die of SIGABRT; the tool counts 1,000 by --runs."""
    command = [sys.executable, str(REPOSITORY / "tools/exit_statuses.py"), "--runs", "4", "--starve"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert '{"processes": 4, "statuses": {"0": 4}}' in ended.stdout


@pytest.mark.parametrize(
    ("module", "label"), {"train": "cosmos-scale train", "cli": "cosmos-scale", "demo": "demo"}.items()
)
def test_a_program_begun_in_a_deleted_folder_says_so(tmp_path: Path, module: str, label: str) -> None:
    (tmp_path / "gone").mkdir()
    ended = subprocess.run(
        ["sh", "-c", f'rmdir "$PWD" && exec "$0" -m cosmos_scale.{module} --help', sys.executable],
        capture_output=True,
        text=True,
        cwd=tmp_path / "gone",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"{label}: the current folder is deleted; rule: change to one that is there\n"


def test_a_program_takes_an_interrupt_before_anything_slow_is_imported() -> None:
    """Until then Ctrl-C is a traceback of Python's start."""
    code = (
        "import sys; sys.argv[0] = 'cosmos-scale'; import cosmos_scale.cli, signal; "
        "assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler; print(*sys.modules)"
    )
    # -S: without what the environment's own start imports.
    command = [sys.executable, "-S", "-c", f"import signal; signal.signal(2, signal.default_int_handler); {code}"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60)
    slow = {"typing", "re", "pathlib", "traceback", "argparse", "contextlib", "cosmos_scale.cli.main"}
    assert not slow & {*ended.stdout.split()}
