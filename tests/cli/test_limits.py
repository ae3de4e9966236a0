"""What a rank looks at before its imports: limits of the process, torch's folder, a run's folder that was copied."""

import errno
import os
import resource
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest.mock import MagicMock

import pytest
from PIL import Image

from cosmos_scale.cli import main as cli
from cosmos_scale.cli.as_rank import read_run
from cosmos_scale.data.decode import picture
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.data.training.loader import TrainLoader
from cosmos_scale.errors import UserError
from cosmos_scale.files import reason_of
from tests.report.run_folders import write_run
from tests.test_files import files_of_at_most


def test_few_open_files_for_ranks_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    others = resource.getrlimit
    monkeypatch.setattr(
        resource, "getrlimit", lambda kind: (40, 1024) if kind == resource.RLIMIT_NOFILE else others(kind)
    )
    assert cli.main(["train", "cc3m_vitb16", "--dry-run"]) == 2
    assert capsys.readouterr().err.endswith("open files: 40 are allowed; rule: at least 64 (ulimit -n)\n")


@pytest.mark.parametrize(
    ("command", "allowed", "said"),
    [
        ("train cc3m_vitb16 --dry-run", 6, "train: threads: 19 more cannot be started; rule: as many must be free for"),
        ("eval retrieval --checkpoint a --data b", 2, "eval retrieval: threads: 3 more cannot be started; rule: as "),
        ("eval retrieval --checkpoint a --data b", 3, "eval retrieval: checkpoint "),
    ],
)
def test_threads_that_cannot_be_started_are_refused_before_a_library_waits_for_them(
    command: str, allowed: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As under `ulimit -u`: gloo waits for ever then, and OpenBLAS sends the process an interrupt."""
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def refused(thread: threading.Thread) -> None:
        if sum(other.is_alive() for other in started) >= allowed:
            raise RuntimeError("can't start new thread")
        start(thread)
        started.append(thread)

    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setattr(threading.Thread, "start", refused)
    assert cli.main(command.split()) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"cosmos-scale {said}")


def test_a_folder_of_torchs_compiler_that_cannot_be_made_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert cli.main(["train", "cc3m_vitb16", "--dry-run"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"cosmos-scale train: TORCHINDUCTOR_CACHE_DIR: {tmp_path}/file/cache cannot be made: Not a ")


@pytest.mark.parametrize("of_the_compiler", [True, False])
def test_a_full_disk_under_torchs_compiler_is_one_line(
    of_the_compiler: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch._inductor.exc import InductorError

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # of a write, which names no file

    def fail() -> int:
        raise InductorError(full, None) if of_the_compiler else RuntimeError(f"of another library: {full}")

    assert cli.exit_status("cosmos-scale train", fail) == 2
    where = "torch's compiler (TORCHINDUCTOR_CACHE_DIR, TMPDIR): " if of_the_compiler else ""
    assert capsys.readouterr().err == f"cosmos-scale train: {where}No space left on device\n"


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


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "Cannot allocate memory; 9,000,000,000 bytes are allowed (ulimit -v)"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you"),
            "Cannot ",
        ),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "Cannot allocate memory; 9,000,000,000 bytes are"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "Cannot allocate memory; 9,"),
        (RuntimeError("Resource temporarily unavailable"), "no thread can be started; allow more (ulimit -u), or "),
        (RuntimeError("can't start new thread"), "no thread can be started; allow more (ulimit -u), or more memory"),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "no process can be started; allow more (ulimit -u)"),
    ],
)
def test_no_memory_is_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (9_000_000_000, 9_000_000_000))
    assert cli.exit_status("cosmos-scale eval retrieval", fail) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cosmos-scale eval retrieval: {said}")


@pytest.mark.parametrize("command", ["train cc3m_vitb16", "eval retrieval --checkpoint a --data b", "launch a"])
def test_a_limit_on_memory_without_room_for_the_libraries_is_refused(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With about 3 GB one of torch's libraries would abort the process, without a word on the cause."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (3_000_000_000, 3_000_000_000))
    assert cli.main(command.split()) == 2
    said = "memory: 3,000,000,000 bytes are allowed; rule: at least 4,294,967,296 (ulimit -v)\n"
    assert capsys.readouterr().err.endswith(said)


def test_a_loader_process_without_memory_is_one_line() -> None:
    error = MemoryError("Caught MemoryError in DataLoader worker process 0.\nTraceback ...\nMemoryError\n")
    batches = MagicMock(__next__=MagicMock(side_effect=error))
    with pytest.raises(
        UserError, match=r"a loader process died \(MemoryError\); if memory ran out, lower data.workers"
    ):
        TrainLoader._next(cast(TrainLoader, SimpleNamespace(_workers=2)), batches)


def test_memory_that_runs_out_is_no_fault_of_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(picture, "_decode_other", fail)
    with pytest.raises(MemoryError):
        picture.decode_rgbx(b"no jpeg", 100)


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


@pytest.mark.parametrize(
    "command",
    [
        ["data", "index", "SHARDS", "--workers", "1", "--out", "OUT"],
        ["data", "build", "--images", "PICTURES", "--captions", "ROWS", "--workers", "1", "--out", "OUT"],
        ["data", "inspect", "SHARDS", "--workers", "1", "--out", "OUT"],
        ["report", "RUN", "--out", "PAGE"],
    ],
)
def test_an_output_beyond_the_limit_on_files_is_one_line_and_the_old_one_stays(
    command: list[str], scenes: SceneShards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "rows.csv").write_text("image,caption\na.jpg,a picture\n")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.jpg")
    places = {"SHARDS": str(scenes.gallery), "PICTURES": str(tmp_path), "ROWS": str(tmp_path / "rows.csv")}
    places |= {"RUN": str(tmp_path / "run"), "OUT": str(out), "PAGE": str(out / "report.html")}
    write_run(tmp_path / "run", [], name="run")
    line = [places.get(word, word) for word in command]
    if command[1] != "build":  # which refuses a folder that holds shards
        assert cli.main(line) == 0
    old = {path: path.read_bytes() for path in out.rglob("*")}
    capsys.readouterr()
    with files_of_at_most(200):
        assert cli.main(line) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"cosmos-scale {command[0]}")
    assert said.endswith(": cannot be written: File too large; allow more (ulimit -f)")
    assert not list(out.rglob("*.part"))
    assert all(path.read_bytes() == data for path, data in old.items())
