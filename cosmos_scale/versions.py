"""What must be equal on all hosts of a run besides its config and data: this package's files, and the packages."""

import hashlib
import importlib.metadata
import platform
import re
from contextlib import suppress
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def sources_digest() -> str:
    """Return a digest of all files of this package: their names and contents."""
    digest = hashlib.sha256()
    for folder in (_PACKAGE, _PACKAGE / "kernels", _PACKAGE / "configs"):  # the latter two may be links
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".yaml", ".cu", ".cuh", ".cpp", ".h") and path.is_file():
                digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


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
