"""What an unfinished indexing of far shards has done, so that no shard is read twice: they may be terabytes."""

import json
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.data.shards.members import ScanRules
from cosmos_scale.data.shards.store import is_web
from cosmos_scale.files import load_json, read_regular, regular_only, writing


class IndexedShard(NamedTuple):
    """One shard whose table is written. size: bytes. rejected: (key, reason). torn: where and how it breaks off.

    dotted: samples whose keys end at the last dot, not at the first one. unnamed: see ShardScan. mark: see mark.py;
    empty: not known. unread, again: (key, reason) of second pictures, and of samples whose key one before them has.
    texts: see ShardScan.
    """

    name: str
    samples: int
    size: int
    rejected: Sequence[tuple[str, str]]
    torn: str | None
    dotted: int = 0
    unnamed: int = 0
    mark: str = ""
    unread: Sequence[tuple[str, str]] = ()
    again: Sequence[tuple[str, str]] = ()
    texts: Sequence[tuple[str, int]] = ()


class Unfinished:
    """A file of shards that are done, a line each. The file is deleted when all shards are done.

    rules: what the user says of the shards; shards that were indexed by other rules are not done. address: says where
    a shard of some name lies; shards of the same names that lie elsewhere are not done.
    """

    def __init__(self, path: Path, rules: ScanRules, address: Callable[[str], str]) -> None:
        self._path = path
        self._rules = [list(rules.captions), rules.last_dot]
        self._address = address

    def read(self, names: Iterable[str]) -> dict[str, IndexedShard]:
        """Return the shards that are done among some shards, by name. A shard whose line is torn is not done."""
        wanted = set(names)
        done = {}
        for line in read_regular(self._path).splitlines() if self._path.exists() else []:
            try:
                *held, rules, place = load_json(line)
                name, samples, size, rejected, torn, dotted, unnamed, mark, *others = held
                faults, *lists = (tuple((key, what) for key, what in pairs) for pairs in (rejected, *others))
                unread, again, texts = lists
            except (ValueError, TypeError):
                continue
            if name in wanted and rules == self._rules and place == self._place(name):
                of_all = (torn, dotted, unnamed, mark)
                done[name] = IndexedShard(name, samples, size, faults, *of_all, unread, again, texts)
        return done

    def append(self, shard: IndexedShard) -> None:
        """Write down that a shard is done."""
        with writing(self._path), open(self._path, "ab", opener=regular_only) as file:
            file.write(json.dumps([*shard, self._rules, self._place(shard.name)]).encode() + b"\n")

    def _place(self, name: str) -> str:
        """Return a digest of where a shard lies: the address itself may hold secrets, and its query changes."""
        address = self._address(name)
        return sha256((address.partition("?")[0] if is_web(address) else address).encode()).hexdigest()[:16]

    def remove(self) -> None:
        """Delete the file: all shards are done, and the index says so."""
        self._path.unlink(missing_ok=True)
