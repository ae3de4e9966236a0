"""What `data verify` found: the faults, their numbers, and the report for people and programs."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_scale.data.samples.sample import reason_class
from cosmos_scale.data.work import MANIFEST
from cosmos_scale.words import counted, first_frame

OLD_INDEX = "old index"  # how the reason begins where a sound shard is not the one that was indexed
LISTED = 20  # faults kept for the terminal; a file takes all


class Fault(NamedTuple):
    """One damaged sample, or with `key` None a damaged shard.

    byte: where the sample's first member starts in the shard. indexed: whether training would read the sample.
    origin: where the sample was built from, if its json can be read and says it.
    """

    shard: str
    key: str | None
    byte: int | None
    reason: str
    indexed: bool
    origin: str | None = None

    @property
    def of_old_index(self) -> bool:
        """Whether the shard is sound, but is not the one that was indexed."""
        return self.reason.startswith(f"{OLD_INDEX}: ")

    def as_record(self) -> dict[str, Any]:
        """Return the fault as plain values; without an origin where none is known."""
        return {name: value for name, value in self._asdict().items() if name != "origin" or value is not None}


@dataclass
class Verdict:
    """What `verify_shards` found. samples, size: of all indexes, in samples and bytes.

    damaged, left_out: samples with faults, in the index and not in it. unreadable: samples of shards that cannot be
    read at all. outdated: samples of the index whose shard has changed since. shards_damaged: shards with a fault of
    their own. checksums: shards that were compared with one.
    transparent, turned: sound pictures with transparent pixels, and those whose EXIF tag says to turn them, which
    training ignores. unread: pictures that are not read, since their sample has another. animated: sound pictures of
    several frames, of which the first is read. again: samples of the index whose key another one before them in the
    shard has. reasons: all faults by reason, numbers left out.
    """

    shards: int = 0
    samples: int = 0
    size: int = 0
    damaged: int = 0
    left_out: int = 0
    unreadable: int = 0
    outdated: int = 0
    shards_damaged: int = 0
    checksums: int = 0
    transparent: int = 0
    turned: int = 0
    unread: int = 0
    animated: int = 0
    again: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[Fault] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing was found."""
        return not self.reasons

    def note(self, fault: Fault) -> None:
        """Count a fault."""
        self.reasons[reason_class(fault.reason, numbers=False)] += 1
        if fault.key is None:
            self.shards_damaged += not fault.of_old_index
        elif fault.indexed:
            self.damaged += 1
        else:
            self.left_out += 1
        if len(self.first) < LISTED:
            self.first.append(fault)

    def describe(self, log: Path | None) -> str:
        """Return the verdict as lines for a terminal; log: where all faults are written, if anywhere."""
        read = f"{counted(self.samples, 'sample')} in {counted(self.shards, 'shard')}, {counted(self.size, 'byte')}"
        if self.checksums:
            read += f"; {counted(self.checksums, 'shard')} compared with the checksums of {MANIFEST}"
        if self.transparent:
            read += f"; {counted(self.transparent, 'transparent picture')} (data.background)"
        if self.turned:
            them = "it" if self.turned == 1 else "them"
            read += f"; {counted(self.turned, 'picture')} with an EXIF tag that turns {them}, which training ignores"
        if self.animated:
            read += f"; {counted(self.animated, 'animated picture')}, {first_frame(self.animated)} read"
        if self.unread:
            read += f"; {counted(self.unread, 'second picture')} of a sample not read"
        if self.again:
            again = counted(self.again, "sample has", "samples have")
            read += f"; {again} the key of a sample before in the shard, and both are read"
        if self.sound:
            return f"{read}: {'it is' if self.samples == 1 else 'all are'} sound"
        lines = [read]
        lost = self.damaged + self.unreadable
        if self.outdated:
            said = "shards that are sound, but not those that were indexed; run `cosmos-scale data index` again"
            lines.append(f"{counted(self.outdated, 'sample')} of an old index, which training refuses: {said}")
        lines.append(f"samples that training cannot use: {lost:,} ({lost / max(1, self.samples):.2%})")
        if self.unreadable:
            lines.append(f"  of these in shards that cannot be read: {self.unreadable:,}")
        if self.left_out:
            lines.append(f"samples that are not in the index, so that training never sees them: {self.left_out:,}")
        if self.shards_damaged:
            lines.append(f"shards with a fault of their own: {self.shards_damaged:,}")
        lines += ["", "times  reason"]
        lines += [f"{times:>5,}  {reason}" for reason, times in self.reasons.most_common()]
        lines += ["", "shard, sample, byte: reason"]
        lines += [
            f"{fault.shard}, {fault.key or 'whole shard'}"
            + ("" if fault.byte is None else f", {fault.byte}")
            + f": {fault.reason}"
            + (f" (built from {fault.origin})" if fault.origin else "")
            for fault in self.first
        ]
        total = self.reasons.total()
        if total > len(self.first):
            lines.append(f"... and {total - len(self.first):,} more" + ("" if log else "; --out FILE names them all"))
        if log:
            lines.append(f"all are in {log}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as plain values."""
        return {**vars(self), "first": [fault.as_record() for fault in self.first], "sound": self.sound}
