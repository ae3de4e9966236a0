"""`make check` must catch a wrong type passed into a kernel, and must pass without it."""

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


def run_mypy(checkout: Path) -> subprocess.CompletedProcess[str]:
    # As `make check` runs it, configured by the copied pyproject.toml; the cache makes the second run short.
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(checkout.parent / "cache"), "cosmos_scale"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_wrong_type_passed_into_a_kernel_is_found(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for folder in ("cosmos_scale", "kernels"):
        shutil.copytree(REPOSITORY / folder, checkout / folder, symlinks=True)
    shutil.copy(REPOSITORY / "pyproject.toml", checkout)
    clean = run_mypy(checkout)
    assert clean.returncode == 0, clean.stdout
    (checkout / "cosmos_scale" / "planted.py").write_text(PLANTED)
    planted = run_mypy(checkout)
    assert planted.returncode == 1, planted.stdout
    errors = [line for line in planted.stdout.splitlines() if ": error: " in line]
    assert errors
    assert all(line.startswith("cosmos_scale/planted.py:5: ") and "[arg-type]" in line for line in errors), errors
