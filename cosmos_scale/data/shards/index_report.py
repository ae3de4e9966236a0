"""What indexing found: a report for a terminal, and rejected.jsonl, which names what the index leaves out,
and what it may hold twice.
"""

import json
import sys
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from cosmos_scale.data.shards.reader import IMAGE_EXTENSIONS
from cosmos_scale.errors import UserError
from cosmos_scale.files import load_json, read_regular, regular_only, replace_file
from cosmos_scale.words import counted

REJECTED = "rejected.jsonl"
REFUSED = "rejected.refused.jsonl"  # of an indexing that was refused, beside an index that stays
SECOND_PICTURE = "second picture"  # begins the reason of a picture beside the one that is read of its sample
SECOND_SAMPLE = "second sample"  # begins the line of a sample that is read, and whose key one before it has

_MOST_TEXTS = 5  # endings in a report


class IndexReport(NamedTuple):
    """What `index_shards` found; `rejected` counts samples by reason, `torn` counts shards that break off.

    dotted: samples whose keys end at the last dot, not at the first one. unnamed: samples whose captions, if
    they have any, stand under no known key. unread: pictures that are not read, since their sample has another.
    alike: pairs of shards of one size and one beginning, the later one first. passed_over: tars of the folder that are
    no shards of it. gone: shards that the manifest or the index before names, and that are no longer there. again:
    samples whose key another one before them in their shard has. texts: samples by the ending of a text beside the
    one that is read.
    """

    folder: Path
    shards: int
    samples: int
    rejected: Counter[str]
    torn: int
    dotted: int
    unnamed: int
    unread: int = 0
    alike: Sequence[tuple[str, str]] = ()
    passed_over: Sequence[str] = ()
    gone: Sequence[str] = ()
    again: int = 0
    texts: Mapping[str, int] = MappingProxyType({})

    def describe(self) -> str:
        """Return the report as lines for a terminal."""
        lines = [f"{counted(self.samples, 'sample')} in {counted(self.shards, 'shard')}; index in {self.folder}"]
        if self.passed_over:
            others = describe_passed_over(self.passed_over)
            lines.append(f"{others} not indexed: a folder means its own .tar files; a pattern names others")
        if self.gone:
            names = f"{', '.join(self.gone[:3])}{', ...' if len(self.gone) > 3 else ''}"
            gone = counted(len(self.gone), "shard is", "shards are")
            lines.append(
                f"{gone} no longer there ({names}), which manifest.json or the index before names: not indexed"
            )
        if self.torn:
            torn = counted(self.torn, "shard breaks off", "shards break off")
            lines.append(f"{torn}: samples before the break are kept")
        if self.dotted:
            dotted = counted(self.dotted, "key has dots: it ends", "keys have dots: they end")
            lines.append(f"{dotted} at the last dot of the member's name")
        if self.unnamed:
            where = "if its captions have another, name it by --captions KEY here and by data.captions.keys in the run"
            unnamed = counted(self.unnamed, "sample has", "samples have")
            lines.append(f"{unnamed} no text or list of texts under a known key; {where}")
        if self.unread:
            order = ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
            lines.append(f"{counted(self.unread, 'second picture')} of a sample not read: the first of {order} is")
        for ending, times in Counter(self.texts).most_common(_MOST_TEXTS):
            have = counted(times, "sample has", "samples have")
            lines.append(f"{have} a .{ending} that is not read: captions are those of the .json or .txt beside it")
        if self.again:
            again = counted(self.again, "sample has", "samples have")
            same = "both are taken: where they are one, corrected by tar -r or -u, write the shard anew"
            lines.append(f"{again} the key of a sample before in the shard; {same}")
        if self.alike:
            pairs = counted(len(self.alike), "shard looks", "shards look")
            example = "{} like {}".format(*self.alike[0])
            lines.append(f"{pairs} like another one ({example}): if they are one, its samples count twice")
        lines += [f"{counted(times, 'sample')} rejected: {reason}" for reason, times in self.rejected.most_common()]
        lines += key_hints(self.rejected)
        if self.torn or self.rejected or self.unread or self.again:
            lines.append(f"each is named in {self.folder / REJECTED}")
        return "\n".join(lines)


def describe_passed_over(tars: Sequence[str]) -> str:
    """Return the beginning of a sentence on tars that a folder does not mean: how many there are, and some names."""
    shown = ", ".join(tars[:3]) + (", ..." if len(tars) > 3 else "")
    return f"{counted(len(tars), 'other tar')} in the folder ({shown}) {'is' if len(tars) == 1 else 'are'}"


def key_hints(rejected: Counter[str]) -> list[str]:
    """Return a line on what a key is, where some samples lack their texts and others their pictures."""
    if not all(any(reason.startswith(lack) for reason in rejected) for lack in ("no picture", "no text")):
        return []
    return ["members of one sample share the name before the first dot: 1.jpg and 1.txt, not image.jpg and caption.txt"]


class Unindexed(NamedTuple):
    """What an index leaves out: samples that it rejected, pictures that are not read beside another one, and what lies
    behind the break of shards that break off. again: samples that it holds, whose key another one before them has.
    """

    samples: int = 0
    pictures: int = 0
    torn: int = 0
    again: int = 0

    def describe(self) -> str:
        """Return what was left out or stands twice, and where it is listed; empty where nothing is."""
        kinds = (("sample", self.samples), ("second picture", self.pictures))
        parts = [counted(number, noun) for noun, number in kinds if number]
        if self.torn:
            parts.append(f"what lies behind the break of {counted(self.torn, 'shard')}")
        lines = [f"not in the index, so never read: {' and '.join(parts)}"] if parts else []
        if self.again:
            again = counted(self.again, "sample has", "samples have")
            lines.append(f"{again} the key of a sample before in the shard, and both are read")
        return f"{'; '.join(lines)} ({REJECTED})" if lines else ""


def count_unindexed(folder: str, shards: Container[str]) -> Unindexed:
    """Count what an index of this machine leaves out of some shards; nothing where no file can be read there."""
    kinds = Counter[str]()
    lines: list[bytes] = []
    with suppress(OSError):
        lines = read_regular(Path(folder) / REJECTED).splitlines()
    for line in lines:
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            fault = load_json(line)
            if fault.get("shard") not in shards:
                continue
            kinds["torn" if fault["key"] is None else fault["reason"].partition(":")[0]] += 1
    pictures, torn, again = kinds.pop(SECOND_PICTURE, 0), kinds.pop("torn", 0), kinds.pop(SECOND_SAMPLE, 0)
    return Unindexed(kinds.total(), pictures, torn, again)


def refuse_foreign_rejected(path: Path) -> None:
    """Raise UserError where a rejected.jsonl is there that no command of this program wrote: it must not be replaced.

    Each line of a report of rejects has a reason. Lines that cannot be read say nothing.
    """
    with suppress(OSError):
        with open(path, "rb", opener=regular_only) as file:
            head = file.read(1 << 16).splitlines()
        for line in head:
            with suppress(ValueError):
                found = load_json(line)
                if not isinstance(found, dict) or "reason" not in found:
                    raise UserError(f"{path}: is no report of rejects; move it away, or name another folder with --out")
                return


def write_faults(folder: Path, names: set[str], faults: list[dict[str, str | None]], *, refused: bool) -> Path:
    """Write what an indexing found unusable, and return the file: REJECTED, or REFUSED where an old index stays."""
    path = folder / REFUSED
    if refused:
        replace_file(path, "".join(json.dumps(fault) + "\n" for fault in faults).encode())
        return path
    path.unlink(missing_ok=True)
    _merge_rejected(folder / REJECTED, names, faults)
    return folder / REJECTED


def _merge_rejected(path: Path, names: set[str], faults: list[dict[str, str | None]]) -> None:
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
