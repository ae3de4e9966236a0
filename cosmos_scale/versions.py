"""Which code this is: this package's files, and the packages. Both must be equal on all hosts of a run."""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from contextlib import suppress
from pathlib import Path

from cosmos_scale import __version__

GIT_SECONDS = 10.0  # for one answer of git
_PACKAGE = Path(__file__).resolve().parent


def part_of_package(name: str) -> Path:
    """Return the folder of `configs` or `kernels`: in an installed package, or beside the package in a checkout.

    A checkout has a link to it in the package; git writes that as a file of text where core.symlinks is false.
    """
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def sources_digest() -> str:
    """Return a digest of all files of this package: their names and contents."""
    digest = hashlib.sha256()
    parts = [part_of_package("kernels"), part_of_package("configs")]
    for folder in (_PACKAGE, *parts):
        for path in sorted(folder.rglob("*")):
            # Parts come once, wherever they lie: a checkout and a package that is installed of it have one digest.
            if folder == _PACKAGE and any(part in path.parents for part in parts):
                continue
            if path.suffix in (".py", ".yaml", ".cu", ".cuh", ".cpp", ".h") and path.is_file():
                digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def code_facts() -> dict[str, str | bool]:
    """Return the version of this package and the digest of its files; of a git checkout its commit too.

    modified: whether files of the package differ from the commit. Without git, or where the package's files belong to
    no checkout, neither commit nor modified is there.
    """
    facts: dict[str, str | bool] = {"version": __version__, "sources": sources_digest()}
    # A package that is installed into a folder of some other project's checkout has nothing to do with its commit.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) and (commit := _git("rev-parse", "HEAD")):
        folders = [str(path.resolve()) for path in (_PACKAGE, part_of_package("kernels"), part_of_package("configs"))]
        changed = _git("status", "--porcelain", "--", *folders)
        if changed is not None:
            facts |= {"commit": commit, "modified": bool(changed)}
    return facts


def _git(*arguments: str) -> str | None:
    """Return what git says of the package's folder; None where it cannot tell."""
    # The environment of a git hook names another checkout. Whose files they are does not matter to who reads them.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-c", "safe.directory=*", "--no-optional-locks", "-C", str(_PACKAGE), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=GIT_SECONDS, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that this one needs, by name."""
    try:
        names = importlib.metadata.requires("cosmos-scale") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        names = ["torch", "deepspeed", "numpy"]
    versions = {}
    for requirement in names:
        if "extra ==" not in requirement:
            match = re.match(r"[\w.-]+", requirement)
            assert match is not None
            with suppress(importlib.metadata.PackageNotFoundError):
                versions[match[0]] = importlib.metadata.version(match[0])
    return versions


def build_of_this_rank() -> dict[str, str]:
    """Return what ranks compare as they meet, by its name: a digest of the sources, Python, and the packages."""
    return {"sources": sources_digest(), "python": platform.python_version(), **package_versions()}
