"""DeepSpeed's communication for CPUs that cannot be built or loaded: one line that names what failed."""

import os
import pwd
import sys
import tempfile
from pathlib import Path

import pytest
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

from cosmos_scale.engine.comm_build import load_cpu_communication, use_own_environment
from cosmos_scale.errors import UserError

NINJA = "Unable to JIT load the deepspeed_shm_comm op due to ninja not being installed."
COMPILER = """Error building extension 'deepspeed_shm_comm': [1/3] /no/g++ -MMD -MF shm.o.d -DERROR
FAILED: shm.o
/no/g++ -MMD -MF shm.o.d
/bin/sh: 1: /no/g++: not found
ninja: build stopped: subcommand failed.
"""
HEADER = """Error building extension 'deepspeed_shm_comm': [1/3] g++ -MMD
torch/extension.h:5:10: fatal error: Python.h: No such file or directory
compilation terminated.
"""
CUT = "/env/torch_extensions/deepspeed_shm_comm.so: file too short"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RuntimeError(NINJA), NINJA),
        (RuntimeError(COMPILER), "/bin/sh: 1: /no/g++: not found"),
        (RuntimeError(HEADER), "torch/extension.h:5:10: fatal error: Python.h: No such file or directory"),
        (ImportError(CUT), CUT),
        (OSError(), "no reason is given"),
    ],
)
def test_what_cannot_be_built_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, cause: str) -> None:
    def fail(self: object, verbose: bool = False) -> None:
        raise error

    monkeypatch.setattr(ShareMemCommBuilder, "load", fail)
    monkeypatch.setenv("CXX", "/no/g++")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/env/torch_extensions")
    with pytest.raises(UserError) as raised:
        load_cpu_communication()
    assert str(raised.value) == (
        f"DeepSpeed's communication for CPUs cannot be built or loaded: {cause}; rule: a C++ compiler (/no/g++) and "
        "ninja work here; delete /env/torch_extensions where its files are damaged, or name another by "
        "TORCH_EXTENSIONS_DIR; `cosmos-scale setup` builds once for all runs"
    )


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, where the environment cannot be written to and no variable names a place."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(sys, "prefix", "/no/environment")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")  # put back after the test, whatever is set in it
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return folder


def _no_entry(uid: int) -> None:
    raise KeyError(f"getpwuid(): uid not found: {uid}")


@pytest.mark.parametrize("home", ["file/home", None])
def test_a_user_without_a_home_builds_into_a_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, temporary: Path, home: str | None
) -> None:
    (temporary.parent / "file").touch()
    if home is None:  # a user by number alone, as in containers
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(pwd, "getpwuid", _no_entry)
    else:
        monkeypatch.setenv("HOME", str(temporary.parent / home))
    for _ in range(2):  # every rank and every launch finds the same folder
        os.environ.pop("TORCH_EXTENSIONS_DIR", None)
        use_own_environment()
        assert os.environ["TORCH_EXTENSIONS_DIR"] == str(temporary / f"torch_extensions_{os.geteuid()}")
    assert not (temporary.parent / "~").exists()


def test_a_home_that_can_be_written_to_is_used(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    monkeypatch.setenv("HOME", str(temporary.parent))
    use_own_environment()
    assert "TORCH_EXTENSIONS_DIR" not in os.environ
    assert not list(temporary.iterdir())


def test_a_temporary_folder_that_others_can_write_to_is_not_used(
    monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    monkeypatch.setenv("HOME", "/proc/none")
    folder = temporary / f"torch_extensions_{os.geteuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    use_own_environment()
    assert "TORCH_EXTENSIONS_DIR" not in os.environ
