"""`make check` must catch a wrong type passed into a kernel, and must find nothing else."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PLANTED = '''"""A planted error."""

from cosmos_scale.kernels.attention import attention

attention("queries", 1.0, None, [7])
'''


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_wrong_type_passed_into_a_kernel_is_found(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for folder in ("cosmos_scale", "kernels"):
        shutil.copytree(REPOSITORY / folder, checkout / folder, symlinks=True)
    shutil.copy(REPOSITORY / "pyproject.toml", checkout)
    (checkout / "cosmos_scale" / "planted.py").write_text(PLANTED)
    # As `make check` runs it, configured by the copied pyproject.toml.
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "cosmos_scale"]
    planted = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert planted.returncode == 1, planted.stdout
    errors = [line for line in planted.stdout.splitlines() if ": error: " in line]
    assert errors
    assert all(line.startswith("cosmos_scale/planted.py:5: ") and "[arg-type]" in line for line in errors), errors
