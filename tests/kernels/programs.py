"""Programs that try Triton kernels: a process decides once whether kernels are interpreted."""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import REPOSITORY

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def json_lines(*arguments: str, interpret: bool, status: int = 0) -> list[Any]:
    """Run a Python program and return the json values that it prints, one a line."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=environment | ({"TRITON_INTERPRET": "1"} if interpret else {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == status, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]
