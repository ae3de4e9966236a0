"""DeepSpeed's communication for CPUs that cannot be built or loaded: one line that names what failed."""

import os
import re
from pathlib import Path

import pytest
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

from cosmos_scale.engine.comm_build import check_extensions, is_built, load_cpu_communication, use_own_environment
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
def test_what_cannot_be_built_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, cause: str
) -> None:
    def fail(self: object, verbose: bool = False) -> None:
        raise error

    monkeypatch.setattr(ShareMemCommBuilder, "load", fail)
    monkeypatch.setenv("CXX", "/no/g++")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(UserError) as raised:
        load_cpu_communication()
    assert str(raised.value) == (
        f"DeepSpeed's communication for CPUs cannot be built or loaded: {cause}; rule: a C++ compiler (/no/g++) and "
        f"ninja work here; delete {tmp_path} where its files are damaged, or name another by "
        "TORCH_EXTENSIONS_DIR; `cosmos-scale setup` builds once for all runs"
    )


def test_a_first_build_is_known_by_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    use_own_environment()
    load_cpu_communication()
    assert is_built()
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # torch's own folder has one for each version
    assert not is_built()
    folder = tmp_path / "torch_extensions" / "py311_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    assert not is_built()
    (folder / "deepspeed_shm_comm.so").touch()
    assert is_built()


def test_torchs_folder_that_cannot_be_made_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user of a container: the environment is root's, and home is / or not known."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # no HOME, and no such user in /etc/passwd
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^TORCH_EXTENSIONS_DIR: not set, and ~/.* no home folder is known; rule: "):
        load_cpu_communication()
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    with pytest.raises(
        UserError, match=r"^TORCH_EXTENSIONS_DIR: not set, and /proc/none/.* cannot be made: .*; rule: "
    ):
        check_extensions()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    check_extensions()


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_for_extensions_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, named: bool
) -> None:
    """The dry run would find nothing, and the launch fail at torch's lock."""
    folder = tmp_path / "torch_extensions"
    below = folder / "py311_cpu"
    below.mkdir(parents=True)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    if named:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own: set[Path] = set()
    monkeypatch.setattr("os.access", lambda path, _: path in own)  # root, as which tests may run, has access to all
    said = f"TORCH_EXTENSIONS_DIR: {'' if named else 'not set, and '}{folder} cannot be written to; rule: name a folder"
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        check_extensions()
    own.add(below)  # of this Python alone
    check_extensions()


@pytest.mark.parametrize("closed", ["deepspeed_shm_comm", "deepspeed_shm_comm/lock"])
def test_a_build_of_another_user_is_passed_over_in_an_environment_and_refused_where_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    """A group shares an environment that all may write to; what one of them has built is his alone."""
    folder = tmp_path / "torch_extensions"
    (folder / "deepspeed_shm_comm").mkdir(parents=True)
    (folder / "deepspeed_shm_comm" / "lock").touch()
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    use_own_environment()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(folder)
    check_extensions()
    monkeypatch.setattr("os.access", lambda path, _: path != folder / closed)
    said = f"TORCH_EXTENSIONS_DIR: {folder}/deepspeed_shm_comm cannot be written to, which another user has built; rule"
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        check_extensions()
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    use_own_environment()
    assert "TORCH_EXTENSIONS_DIR" not in os.environ
