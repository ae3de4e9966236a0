"""What a rank looks at before its imports: limits of the process, torch's folder, a run's folder that was copied."""

import errno
import os
import resource
from pathlib import Path

import pytest

from cosmos_scale.cli import main as cli
from cosmos_scale.cli.as_rank import read_run
from cosmos_scale.files import reason_of
from tests.test_files import files_of_at_most


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


def test_a_file_beyond_the_limit_on_files_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> int:
        with files_of_at_most(10), (tmp_path / "file").open("wb", buffering=0) as file:
            file.write(bytes(10))
            try:
                file.write(bytes(10))
            except OSError as error:
                raise OSError(error.errno, reason_of(error)) from error
        return 0

    assert cli.exit_status("cosmos-scale data build", write) == 2
    assert capsys.readouterr().err == "cosmos-scale data build: File too large; allow more (ulimit -f)\n"


@pytest.mark.parametrize("copied", [True, False])
def test_the_config_of_a_copied_run_says_which_run_goes_on(
    copied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's config.yaml names its output; a run that is started from a copy goes on in the first folder, or anew."""
    folder = tmp_path / "copy" / "tiny"
    (folder / "checkpoints").mkdir(parents=True)
    output = tmp_path / "first" if copied else tmp_path / "copy"
    file = folder / "config.yaml"
    file.write_text(f"extends: cosmos:run/cc3m_vitb16\nname: tiny\noutput: {output}\n")
    config = read_run(str(file), [])
    assert config.output == output
    said = f"{file}: lies in the folder of a run, but names another, {output}/tiny, where this run goes on; to go on "
    rest = f"with this one, call its folder tiny and say output={tmp_path}/copy\n"
    assert capsys.readouterr().err == (said + rest if copied else "")
