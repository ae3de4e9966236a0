"""What an unfinished indexing of far shards has done, so that no shard is read twice: they may be terabytes."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.files import writing


class IndexedShard(NamedTuple):
    """One shard whose table is written.

    size: bytes. rejected: (key, reason). torn: where and how it breaks off. mark: see mark.py; empty: not known.
    """

    name: str
    samples: int
    size: int
    rejected: list[tuple[str, str]]
    torn: str | None
    mark: str = ""


class Unfinished:
    """A file of shards that are done, a line each. The file is deleted when all shards are done."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, names: Iterable[str]) -> dict[str, IndexedShard]:
        """Return the shards that are done among some shards, by name. A shard whose line is torn is not done."""
        wanted = set(names)
        done = {}
        for line in self._path.read_bytes().splitlines() if self._path.exists() else []:
            try:
                name, samples, size, rejected, torn, *mark = json.loads(line)
            except (ValueError, TypeError):
                continue
            if name in wanted:
                done[name] = IndexedShard(name, samples, size, [(key, reason) for key, reason in rejected], torn, *mark)
        return done

    def append(self, shard: IndexedShard) -> None:
        """Write down that a shard is done."""
        with writing(self._path), self._path.open("ab") as file:
            file.write(json.dumps(shard).encode() + b"\n")

    def remove(self) -> None:
        """Delete the file: all shards are done, and the index says so."""
        self._path.unlink(missing_ok=True)
