"""What tells which code runs: of a git checkout the commit, elsewhere the version and the files' digest alone."""

import shutil
import subprocess
from pathlib import Path

import pytest

from cosmos_scale import __version__, versions
from cosmos_scale.versions import code_facts, part_of_package, sources_digest


def git(folder: Path, *arguments: str) -> str:
    named = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", str(folder), *named, *arguments], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of one file, in whose place `versions` looks."""
    package = tmp_path / "cosmos_scale"
    package.mkdir()
    (package / "versions.py").write_text("")
    monkeypatch.setattr(versions, "_PACKAGE", package)
    return package


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_of_a_checkout_commit_and_changes_are_told(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(package.parent, "init", "-q")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook of some other checkout
    assert set(code_facts()) == {"version", "sources"}  # a checkout that does not hold the package's files
    monkeypatch.delenv("GIT_DIR")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-qm", "a")
    commit = git(package.parent, "rev-parse", "HEAD").strip()
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    first = code_facts()
    assert first == {"version": __version__, "sources": first["sources"], "commit": commit, "modified": False}
    (package / "versions.py").write_text("A = 1")
    second = code_facts()
    assert (second["commit"], second["modified"]) == (commit, True)
    assert first["sources"] != second["sources"]


def test_elsewhere_there_is_no_commit(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(code_facts()) == {"version", "sources"}
    monkeypatch.setenv("PATH", "")
    assert set(code_facts()) == {"version", "sources"}


def test_a_checkout_a_package_installed_of_it_and_a_checkout_without_links_have_one_digest(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, file in (("kernels", "a.py"), ("configs", "run.yaml")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(name)
        (package / name).symlink_to(tmp_path / name)
    checkout = sources_digest()
    for name in ("kernels", "configs"):  # as `git clone -c core.symlinks=false` leaves them
        (package / name).unlink()
        (package / name).write_text(f"../{name}")
        assert part_of_package(name) == tmp_path / name
    assert sources_digest() == checkout
    for name in ("kernels", "configs"):
        (package / name).unlink()
        shutil.move(tmp_path / name, package)
    assert sources_digest() == checkout
    (package / "kernels" / "a.py").write_text("another")
    assert sources_digest() != checkout
