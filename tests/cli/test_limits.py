"""Limits of a process that libraries tell by tracebacks: open files, and the folder of torch's compiler."""

import errno
import os
import resource
from pathlib import Path

import pytest

from cosmos_scale.cli import main as cli


def test_few_open_files_for_ranks_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (40, 1024))
    assert cli.main(["train", "cc3m_vitb16", "--dry-run"]) == 2
    assert capsys.readouterr().err.endswith("open files: 40 are allowed; rule: at least 64 (ulimit -n)\n")


def test_a_folder_of_torchs_compiler_that_cannot_be_made_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert cli.main(["train", "cc3m_vitb16", "--dry-run"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"cosmos-scale train: TORCHINDUCTOR_CACHE_DIR: {tmp_path}/file/cache cannot be made: Not a ")


@pytest.mark.parametrize("direct", [True, False])
def test_a_librarys_error_of_too_few_open_files_is_one_line(direct: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        if direct:
            raise RuntimeError("[enforce fail at loop.cc:48] rv != -1. -1 vs -1. pipe: Too many open files")
        raise RuntimeError("no such library") from OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x.so")

    assert cli.exit_status("cosmos-scale train", fail) == 2
    assert capsys.readouterr().err == "cosmos-scale train: Too many open files; allow more (ulimit -n)\n"

    def ours() -> int:
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="of ours"):
        cli.exit_status("cosmos-scale train", ours)
