"""The package as users install it: what wheel and sdist hold, and the programs without a checkout."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from tests.conftest import REPOSITORY

SOURCES = ("cosmos_scale", "kernels", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


class Built(NamedTuple):
    """The files of a build, by their names without the archive's own folder, and the archive."""

    archive: Path
    names: set[str]


def build(kind: str, source: Path, out: Path) -> Path:
    out.mkdir()
    subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(out)], cwd=source, check=True, capture_output=True
    )
    (archive,) = out.iterdir()
    return archive


def checkout_copy(folder: Path) -> Path:
    """What a clone holds of the package: to build in it leaves the real checkout alone."""
    folder.mkdir()
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("wheel")
    archive = build("wheel", checkout_copy(folder / "checkout"), folder / "out")
    return Built(archive, set(zipfile.ZipFile(archive).namelist()))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("sdist")
    archive = build("sdist", checkout_copy(folder / "checkout"), folder / "out")
    with tarfile.open(archive) as opened:
        return Built(archive, {name.partition("/")[2] for name in opened.getnames()})


def packaged() -> set[str]:
    """The files that an installed package needs, by their names in it."""
    patterns = ("**/*.py", "evaluation/prompts/*.txt", "report/templates/*")
    of_package = [path for pattern in patterns for path in REPOSITORY.glob(f"cosmos_scale/{pattern}")]
    of_package.append(REPOSITORY / "cosmos_scale" / "py.typed")  # without it type checkers see no types
    found = {path.relative_to(REPOSITORY).as_posix() for path in of_package}
    for folder, pattern in (("kernels", "**/*.py"), ("configs", "**/*.yaml")):
        found |= {f"cosmos_scale/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / folder).glob(pattern)}
    return found


def test_the_wheel_has_every_module_config_and_the_licence(wheel: Built) -> None:
    assert packaged() - wheel.names == set()
    code = {name for name in wheel.names if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in code} == {"cosmos_scale"}  # no top-level `kernels`, `configs`, `tests`
    (metadata,) = (name for name in wheel.names if name.endswith(".dist-info/METADATA"))
    (licence,) = (name for name in wheel.names if name.endswith("/LICENSE"))
    with zipfile.ZipFile(wheel.archive) as opened:
        fields = email.message_from_bytes(opened.read(metadata))
        assert opened.read(licence) == (REPOSITORY / "LICENSE").read_bytes()
    assert fields["Name"] == "cosmos-scale"
    assert "MIT" in str(fields["License"] or fields["License-Expression"])
    assert "torch" in " ".join(fields.get_all("Requires-Dist") or [])


def test_the_sdist_builds_the_same_wheel(wheel: Built, sdist: Built, tmp_path: Path) -> None:
    assert {"LICENSE", "README.md", "kernels/attention.py", "configs/run/cc3m_vitb16.yaml"} <= sdist.names
    shutil.unpack_archive(sdist.archive, tmp_path / "unpacked")
    (source,) = (tmp_path / "unpacked").iterdir()
    again = build("wheel", source, tmp_path / "out")
    assert set(zipfile.ZipFile(again).namelist()) == wheel.names


def test_a_second_build_holds_nothing_that_is_gone_from_the_checkout(tmp_path: Path) -> None:
    source = checkout_copy(tmp_path / "checkout")
    gone = [source / "cosmos_scale" / "run" / "gone.py", source / "configs" / "run" / "gone.yaml"]
    for path in gone:
        path.touch()
    first = zipfile.ZipFile(build("wheel", source, tmp_path / "first")).namelist()
    for path in gone:
        path.unlink()
    second = zipfile.ZipFile(build("wheel", source, tmp_path / "second")).namelist()
    assert set(first) - set(second) == {"cosmos_scale/run/gone.py", "cosmos_scale/configs/run/gone.yaml"}


def run(installed: Path, folder: Path, arguments: Sequence[str], status: int = 0) -> str:
    """Run a module of an installed package in another folder; return all that it printed."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", *arguments]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == status, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def installed(wheel: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    pip = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), str(wheel.archive)]
    subprocess.run([sys.executable, "-m", "pip", *pip], check=True, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_installed_wheel_needs_no_checkout(installed: Path, tmp_path: Path) -> None:
    where = "import cosmos_scale.kernels.attention as module; print(module.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()).is_relative_to(installed)
    shown = run(installed, tmp_path, ["cosmos_scale.cli", "train", "--dry-run", "cc3m_vitb16"])
    assert str(installed) in shown
    assert "152,382,466 in 323 tensors" in shown
    assert "cosmos:train/published" in run(installed, tmp_path, ["cosmos_scale.cli", "configs"])
    run(installed, tmp_path, ["cosmos_scale.cli", "configs", "--write", "demo", "my_run.yaml"])
    run(installed, tmp_path, ["cosmos_scale.cli", "train", "--dry-run", "my_run.yaml"])
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "photos" / "a.jpg")
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,Something red.\n")
    build = ["data", "build", "--images", "photos", "--captions", "captions.csv", "--out", "shards"]
    assert "1 sample" in run(installed, tmp_path, ["cosmos_scale.cli", *build, "--workers=1", "--quiet"])
    assert "It learned" in run(installed, tmp_path, ["cosmos_scale.demo", "--quick", "--out", "demo"])
    assert (tmp_path / "demo" / "summary.json").is_file()


def test_the_trainer_starts_as_a_file_too(tmp_path: Path) -> None:
    """As by `torchrun cosmos_scale/train.py`: Python puts its folder first, where `profile` is not the one of torch."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    started = [sys.executable, str(REPOSITORY / "cosmos_scale" / "train.py"), "--dry-run", "cc3m_vitb16"]
    ended = subprocess.run(started, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("module", ["cosmos_scale.cli", "cosmos_scale.train"])
def test_files_of_the_current_folder_hide_no_module(module: str, tmp_path: Path) -> None:
    """`python -m`, as launchers start a rank, puts that folder first."""
    for name in ("PIL", "inspect", "numpy", "profile", "queue", "resource", "rich", "threading", "typing", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('mine')\n")
    arguments = ["train"] * (module == "cosmos_scale.cli") + ["--dry-run", "cc3m_vitb16"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    started = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(started, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert (ended.returncode, "mine" in ended.stderr) == (0, False), ended.stdout + ended.stderr
