"""OMP_NUM_THREADS as users set it: what libgomp refuses counts as unset, and is told once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cosmos_scale.openmp import VARIABLE, drop_wrong_threads
from tests.conftest import REPOSITORY

TAKEN = ["1", "8", " 2 ", "+3", "4,2", "4 , 2", "100000", str(2**63 - 1)]
REFUSED = ["", " ", "auto", "0", "-1", "4,", "4,0", "1e3", "2.5", "0x4", "3 x", "1_0", "٣", str(2**63), str(2**64)]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_is_no_number_of_threads_is_unset_and_told_by_rank_0(
    rank: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    for value in (*TAKEN, *REFUSED):
        monkeypatch.setenv(VARIABLE, value)
        drop_wrong_threads("cosmos-scale train")
        assert os.environ.get(VARIABLE) == (value if value in TAKEN else None)
        told = f"cosmos-scale train: OMP_NUM_THREADS: {value!r} counts as unset; rule: a whole number from 1 on\n"
        assert capfd.readouterr().err == (told if value in REFUSED and rank == "0" else "")
    drop_wrong_threads("cosmos-scale train")
    assert capfd.readouterr().err == ""


def test_libgomp_itself_refuses_the_same() -> None:
    library = next(Path(torch.__file__).parent.glob("lib/libgomp*.so*"), None)
    if library is None:
        pytest.skip("this torch computes with another library")
    code = f"import ctypes; ctypes.CDLL({str(library)!r})"
    for value in (*TAKEN, *REFUSED):
        environment = os.environ | {VARIABLE: value}
        said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
        assert ("Invalid value" in said.stderr) == (value in REFUSED), value


RUN = ("cc3m_vitb16", "log.level=warning")
ONE_OF_TWO = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("module", "words", "level"),
    [
        ("cosmos_scale.train", RUN, "WARNING"),
        ("cosmos_scale.profile", RUN, "WARNING"),
        ("cosmos_scale.cli", ("train", *RUN), "WARNING"),
        ("cosmos_scale.cli", ("eval", "retrieval", "--checkpoint", "none", "--data", "none"), "ERROR"),
    ],
)
def test_a_rank_settles_its_variables_before_torch_is_imported(
    module: str, words: tuple[str, ...], level: str, tmp_path: Path
) -> None:
    """OMP_NUM_THREADS without a number is gone, and torch's C++ code is told how little it may say."""
    (tmp_path / "torch").mkdir()
    shown = "print(*map(os.environ.get, ('OMP_NUM_THREADS', 'TORCH_CPP_LOG_LEVEL')), flush=True)"
    (tmp_path / "torch" / "__init__.py").write_text(f"import os\n{shown}\nos._exit(7)\n")
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    environment |= {VARIABLE: "auto", "PYTHONPATH": f"{tmp_path}:{REPOSITORY}", **ONE_OF_TWO}
    ended = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout) == (7, f"None {level}\n"), ended.stderr
    assert ended.stderr.count(": OMP_NUM_THREADS: 'auto' counts as unset; rule: a whole number from 1 on\n") == 1
