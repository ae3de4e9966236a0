"""The manifest beside shards: the size and the SHA-256 of each, as they were written. `data verify` compares them."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cosmos_scale.data.shards.patterns import ShardPattern
from cosmos_scale.data.shards.store import is_remote
from cosmos_scale.data.shards.summary import ShardRow
from cosmos_scale.data.work import MANIFEST
from cosmos_scale.errors import UserError
from cosmos_scale.files import load_json, read_regular, regular_only, replace_file


class ShardSum(NamedTuple):
    """What a manifest says of one shard: the name of its file, its samples, its size in bytes, its SHA-256."""

    shard: str
    samples: int
    bytes: int
    sha256: str


class DigestSink:
    """A file to write to that knows the size and the digest of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        """Write bytes to the file, and count them."""
        self.digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def close(self) -> None:
        """The file is closed by its owner."""


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    digest = sha256()
    with open(path, "rb", opener=regular_only) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_shard_sums(path: Path, content: Mapping[str, Any], shards: Iterable[ShardSum]) -> None:
    """Write a manifest, whole or not at all: what it says of all shards, and then a line a shard, for diff."""
    lines = ",\n".join(f"  {json.dumps(shard._asdict())}" for shard in shards)
    head = json.dumps(content, indent=1).removesuffix("\n}")
    replace_file(path, f'{head},\n "shards": [\n{lines}\n ]\n}}\n'.encode())


def noted_checksums(path: Path) -> dict[str, str]:
    """Return the SHA-256 of shards by name, as a manifest notes them; none where no manifest of shards is there.

    Raises: UserError where the manifest is closed to the user, so that nothing would be compared.
    """
    try:
        return {str(shard["shard"]): str(shard["sha256"]) for shard in load_json(read_regular(path))["shards"]}
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; its checksums are to be compared") from error
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def gone_shards(shards: ShardPattern, names: Sequence[str], before: Iterable[ShardRow]) -> list[str]:
    """Return the shards that the manifest beside them or the index before names, and that are no longer there.

    names: the shards that the pattern means now. Only shards of this machine can be looked for.
    """
    if shards.folder is None or is_remote(shards.folder):
        return []
    known = {row.name for row in before}
    with suppress(UserError):  # of a manifest that is closed to the user
        known.update(noted_checksums(Path(shards.folder) / MANIFEST))
    return sorted(name for name in known.difference(names) if not os.path.lexists(shards.address(name)))


def refuse_foreign_manifest(path: Path, own: str) -> None:
    """Raise UserError where a file is there whose `format` is not `own`, or is not known: it must not be replaced."""
    try:
        found = load_json(read_regular(path))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; name another folder with --out") from error
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != own:
        raise UserError(f"{path}: is the file of another program; move it away, or name another folder with --out")
