"""What indexing found: a report for a terminal, and rejected.jsonl, which names what the index leaves out."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.errors import UserError
from cosmos_scale.files import load_json, read_regular, replace_file
from cosmos_scale.words import counted

REJECTED = "rejected.jsonl"


class IndexReport(NamedTuple):
    """What `index_shards` found; `rejected` counts samples by reason, `torn` counts shards that break off.

    dotted: samples whose keys end at the last dot, not at the first one. unnamed: samples whose captions, if
    they have any, stand under no known key.
    """

    folder: Path
    shards: int
    samples: int
    rejected: Counter[str]
    torn: int
    dotted: int
    unnamed: int

    def describe(self) -> str:
        """Return the report as lines for a terminal."""
        lines = [f"{counted(self.samples, 'sample')} in {counted(self.shards, 'shard')}; index in {self.folder}"]
        if self.torn:
            torn = counted(self.torn, "shard breaks off", "shards break off")
            lines.append(f"{torn}: samples before the break are kept")
        if self.dotted:
            dotted = counted(self.dotted, "key has dots: it ends", "keys have dots: they end")
            lines.append(f"{dotted} at the last dot of the member's name")
        if self.unnamed:
            where = "name its key by --captions KEY here and by data.captions.keys in the run"
            unnamed = counted(self.unnamed, "sample has", "samples have")
            lines.append(f"{unnamed} no caption under a known key; {where}")
        lines += [f"{counted(times, 'sample')} rejected: {reason}" for reason, times in self.rejected.most_common()]
        lines += key_hints(self.rejected)
        if self.torn or self.rejected:
            lines.append(f"each is named in {self.folder / REJECTED}")
        return "\n".join(lines)


def key_hints(rejected: Counter[str]) -> list[str]:
    """Return a line on what a key is, where some samples lack their texts and others their pictures."""
    if not all(any(reason.startswith(lack) for reason in rejected) for lack in ("no picture", "no text")):
        return []
    return ["members of one sample share the name before the first dot: 1.jpg and 1.txt, not image.jpg and caption.txt"]


def merge_rejected(path: Path, names: set[str], faults: list[dict[str, str | None]]) -> None:
    """Rewrite rejected.jsonl; lines of other shards stay, and lines of the pictures that a build refused."""
    kept, unreadable = [], 0
    try:
        old_lines = read_regular(path).splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    for line in old_lines:
        try:
            fault = load_json(line)
            if fault.get("shard") not in names:
                kept.append(json.dumps(fault))
        except (ValueError, AttributeError, TypeError):
            unreadable += 1
    if unreadable:
        print(f"{path}: {counted(unreadable, 'unreadable line is', 'unreadable lines are')} dropped", file=sys.stderr)
    lines = kept + [json.dumps(fault) for fault in faults]
    if lines or path.exists():
        replace_file(path, "".join(line + "\n" for line in lines).encode())
