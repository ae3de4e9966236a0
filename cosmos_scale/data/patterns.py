"""Which shards a user means: a folder, one path, or a glob or brace pattern such as `cc3m/{00000..00331}.tar`."""

import glob
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from braceexpand import braceexpand

from cosmos_scale.errors import UserError

COMPRESSED_ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")


def pattern_root(pattern: str) -> Path:
    """Return the folder that shard names are relative to: the deepest one before any wildcard or brace."""
    path = Path(pattern)
    if path.is_dir():
        return path
    plain = []
    for part in path.parts[:-1]:
        if _has_wildcard(part) or "{" in part:
            break
        plain.append(part)
    return Path(*plain)


def list_shards(pattern: str) -> list[str]:
    """List the shards on disk that a folder or a glob or brace pattern means, sorted, relative to its root.

    Raises: UserError where the folder holds compressed tars, or a shard named in full does not exist.
    """
    names, missing = on_disk(pattern)
    if missing == [pattern]:
        raise UserError(f"{pattern}: no such shard or folder of shards")
    if missing:
        raise UserError(f"{pattern}: {len(missing)} of its shards do not exist, the first is {missing[0]}")
    return names


def on_disk(pattern: str) -> tuple[list[str], list[str]]:
    """List the shards that a pattern means, and the paths that it names in full but that do not exist.

    Raises: UserError where a folder holds compressed tars, or the pattern is or expands to an empty path.
    """
    root = pattern_root(pattern)
    if os.path.isdir(pattern):  # pathlib would take an empty path for the current folder
        files = sorted(os.listdir(pattern))
        compressed = [name for name in files if name.lower().endswith(COMPRESSED_ENDINGS)]
        if compressed:
            raise UserError(f"{root / compressed[0]}: is compressed; samples are read by offset, so unpack it to .tar")
        return [name for name in files if name.endswith(".tar")], []
    names: set[str] = set()
    missing = []
    for path in _expand(pattern):
        if _has_wildcard(path):
            names.update(os.path.relpath(match, root) for match in glob.glob(path))
        elif os.path.isfile(path):
            names.add(os.path.relpath(path, root))
        else:
            missing.append(path)
    return sorted(names), missing


def matcher(pattern: str, root: Path) -> Callable[[str], bool]:
    """Return a test of whether a pattern means a shard's name; it does not look for the shard on the disk."""
    if Path(pattern).is_dir():
        return lambda name: "/" not in name
    paths = [os.path.relpath(path, root) for path in _expand(pattern)]
    named = {path for path in paths if not _has_wildcard(path)}
    wild = [PurePosixPath(path) for path in paths if _has_wildcard(path)]

    def means(name: str) -> bool:
        # `match` compares from the right: equal depths make it compare the whole name
        parts = PurePosixPath(name)
        return name in named or any(len(parts.parts) == len(w.parts) and parts.match(str(w)) for w in wild)

    return means


def _expand(pattern: str) -> list[str]:
    try:
        paths = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{pattern}: not a valid pattern: {error}") from error
    if "" in paths:
        raise UserError(f"'{pattern}': means an empty path; name a folder of shards or a pattern of .tar files")
    return paths


def _has_wildcard(path: str) -> bool:
    return any(sign in path for sign in "*?[")
