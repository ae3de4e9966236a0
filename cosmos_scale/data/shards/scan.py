"""What a shard holds: which members make a sample, where they lie, and what cannot be used.

Members belong together by webdataset's rule: the same path up to the first dot of the file name, one after the other.
A sample is one picture (.jpg, .png, .jpeg, .webp) and one text (.json, or .txt, which becomes {"caption": text}). Of
several pictures the first in this order is read, as the published loader does; the others are named. Members of
other extensions (`.mask.png` is one: the extension starts at the first dot) are left alone. Links and sparse files are
no files here, as in webdataset: a sample that needs one is rejected.
Where an extension comes a second time in members of one key, a second sample begins, which is rejected: keys name
samples. Whole samples of one key that lie apart are all taken, since joined shards have such, and counted.
Two cases go beyond webdataset's rule, and take samples that the rule rejects. Where no extension from the first dot on
is one of the above, the key ends at the last dot (`www.a.org_1.jpg`). And members of one key that lie apart, such as
all pictures before all texts, are joined.
"""

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cosmos_scale.config import RemoteConfig
from cosmos_scale.data.shards.index_report import SECOND_PICTURE, SECOND_SAMPLE
from cosmos_scale.data.shards.mark import HEAD, mark_of
from cosmos_scale.data.shards.members import (
    DEFAULT_RULES,
    FoundText,
    ScanRules,
    TarMember,
    find_text,
    first_of,
    foreign_fault,
    picture_fault,
)
from cosmos_scale.data.shards.reader import (
    BLOCK,
    DEFAULT_REMOTE,
    IMAGE_EXTENSIONS,
    TEXT_EXTENSIONS,
    Entry,
    refuse_other_kinds,
)
from cosmos_scale.data.shards.store import Transient, fetch_into, is_remote
from cosmos_scale.errors import UserError
from cosmos_scale.files import regular_only, temporary_copy

_MOST_NAMED = 5  # endings in a reason
_MOST_PADDING = 1 << 16  # bytes of zeros at a tar's end; writers make 10 KiB or less of them unless asked for more
# Endings under which people keep captions beside the text that is read, such as those of another captioner.
_TEXT = re.compile(r"text|captions?|.+\.(txt|text|captions?)|.*caption.*\.json", re.IGNORECASE | re.DOTALL)
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


class Rejected(NamedTuple):
    """A sample that cannot be used.

    byte: start of the picture's or text's header, the earlier one; without either, of the first member's header.
    """

    key: str
    reason: str
    byte: int


class ShardScan(NamedTuple):
    """What one shard holds; `torn` says where and how it breaks off, if it does.

    unnamed: samples among `entries` whose captions, if they have any, stand under no known key. mark: as `mark_of`
    makes it. unread: pictures of samples among `entries` that are not read, since another one is. texts: endings of
    texts beside those that are read, with the number of samples among `entries` that have one.
    """

    size: int
    entries: list[Entry]
    rejected: list[Rejected]
    torn: str | None
    unnamed: int = 0
    mark: str = ""
    unread: Sequence[Rejected] = ()
    texts: Sequence[tuple[str, int]] = ()

    @property
    def again(self) -> list[Rejected]:
        """The samples among `entries` whose key another one before them has; all are read."""
        first: dict[str, Entry] = {}
        pairs = ((entry, first.setdefault(entry.key, entry)) for entry in self.entries)
        return [
            Rejected(entry.key, f"{SECOND_SAMPLE}: at byte {entry.start}, and before at {before.start}", entry.start)
            for entry, before in pairs
            if entry is not before
        ]


def scan_shard(
    address: Path | str,
    shown: str | None = None,
    remote: RemoteConfig = DEFAULT_REMOTE,
    rules: ScanRules = DEFAULT_RULES,
) -> ShardScan:
    """Read a shard's headers and texts, not its pixels, and list its samples in order.

    A shard that is not a file of this machine is read once, through a temporary file. shown: the shard in messages.
    Raises: UserError where the shard is missing, compressed or cannot be read.
    """
    name = shown or str(address)
    try:
        with ExitStack() as stack:
            if isinstance(address, str) and is_remote(address):
                file: BinaryIO = stack.enter_context(temporary_copy())
                fetch_into(file, address, remote)
            else:
                file = stack.enter_context(open(address, "rb", opener=regular_only))
            head = file.read(HEAD)
            refuse_other_kinds(name, head)
            return _scan(file, rules)._replace(mark=mark_of(head))
    except Transient as failure:
        raise UserError(f"{name}: cannot be read: {failure}") from failure
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from error


def _scan(file: BinaryIO, rules: ScanRules) -> ShardScan:
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    samples = _Samples(file, rules)
    torn: list[str] = []
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
        except (tarfile.TarError, ValueError) as error:
            return ShardScan(size, [], [], f"not a tar file: {error}")
        members = _members(archive, size, torn)
        if rules.last_dot:
            members = map(attrgetter("by_last_dot"), members)
        for _, group in groupby(members, key=attrgetter("key")):
            samples.add(list(group))
        samples.join()
    end = torn[0] if torn else None
    found = ShardScan(size, samples.entries, samples.rejected, end, samples.unnamed)
    return found._replace(unread=samples.unread, texts=sorted(samples.texts.items()))


class _Samples:
    """The samples of one shard, made of groups of members that have one key and lie side by side."""

    def __init__(self, file: BinaryIO, rules: ScanRules) -> None:
        self.entries: list[Entry] = []
        self.rejected: list[Rejected] = []
        self.unread: list[Rejected] = []
        self.texts: Counter[str] = Counter()
        self.unnamed = 0
        self._file, self._rules = file, rules
        self._incomplete: dict[str, list[list[TarMember]]] = {}  # groups without picture, text or caption

    def add(self, group: list[TarMember]) -> None:
        """Take a group; an incomplete group waits for `join`."""
        for members in _samples_in(group):
            first, repeats = _split_repeats(members)
            if not self._judge(first, repeats, alone=False):
                self._incomplete.setdefault(members[0].key, []).append(members)
        if any(member.is_used for member in group):
            self._reject_dotted(group)

    def join(self) -> None:
        """Join incomplete groups of one key if they make one sample, and reject the others; call it once, at the end.

        A repeated extension would leave open which members belong together: then each group is rejected by itself.
        """
        for groups in self._incomplete.values():
            joined = [member for group in groups for member in group]
            used = [member.extension for member in joined if member.is_used]
            for members in [joined] if len(used) == len(set(used)) else groups:
                self._judge(*_split_repeats(members), alone=True)
        # The shard's order, which the joined samples are not in.
        self.entries.sort(key=attrgetter("start"))
        self.rejected.sort(key=attrgetter("byte"))

    def _judge(self, members: list[TarMember], repeats: list[TarMember], *, alone: bool) -> bool:
        """Take the sample of some members, or reject it; False where members may be missing that lie elsewhere.

        repeats: first members of further samples of its key. alone: there are no members elsewhere.
        """
        key, image, text = members[0].key, first_of(members, IMAGE_EXTENSIONS), first_of(members, TEXT_EXTENSIONS)
        start = min(member.offset for member in (image, text) if member) if image or text else members[0].offset
        found: FoundText | str | None = None
        if alone and (image is None or text is None):
            found = "no picture (.jpg, .jpeg, .png, .webp)" if image is None else "no text (.json, .txt)"
            if others := dict.fromkeys(member.extension for member in members if not member.is_used):
                found += f", but {', '.join(f'.{extension}' for extension in islice(others, _MOST_NAMED))}"
        elif image and text:
            found = foreign_fault((image, text)) or picture_fault(self._file, image)
            plain = [member for member in members if member.foreign is None]
            found = found or find_text(self._file, plain, image, self._rules, alone)
            if isinstance(found, FoundText):
                self.entries.append(Entry(key, image.offset, image.size, *found.fields))
                self.unnamed += not found.is_named
                self.unread += _unread(members, image)
                self.texts.update({member.extension for member in members if _TEXT.fullmatch(member.extension)})
        if found is None:
            return False
        if isinstance(found, str):
            self.rejected.append(Rejected(key, found, start - BLOCK))
        for repeat in repeats:
            byte = repeat.offset - BLOCK
            self.rejected.append(Rejected(key, f"duplicate key: again at byte {byte}", byte))
        return True

    def _reject_dotted(self, group: list[TarMember]) -> None:
        """Name what would be samples beside the group's own one if keys ended at the last dot."""
        for members in _by_key([member.by_last_dot for member in group if not member.is_used]):
            image, text = first_of(members, IMAGE_EXTENSIONS), first_of(members, TEXT_EXTENSIONS)
            if image and text:
                reason = f"key with dots: a part of {group[0].key}; --last-dot makes it a sample of its own"
                self.rejected.append(Rejected(members[0].key, reason, min(image.offset, text.offset) - BLOCK))


def _unread(members: list[TarMember], image: TarMember) -> list[Rejected]:
    """Name the pictures of a sample that are not read."""
    others = [member for member in members if member.extension in IMAGE_EXTENSIONS and member is not image]
    return [
        Rejected(
            other.key, f"{SECOND_PICTURE}: .{image.extension} is read, not .{other.extension}", other.offset - BLOCK
        )
        for other in others
    ]


def _samples_in(group: list[TarMember]) -> list[list[TarMember]]:
    """Divide a group of one key: by the last dot where no extension from the first dot on is a sample's."""
    if not any(member.is_used for member in group):
        dotted = [member.by_last_dot for member in group]
        if any(member.is_used for member in dotted):
            return _by_key([member for member in dotted if member.is_used])
    return [group]


def _by_key(members: list[TarMember]) -> list[list[TarMember]]:
    groups: dict[str, list[TarMember]] = {}
    for member in members:
        groups.setdefault(member.key, []).append(member)
    return list(groups.values())


def _members(archive: tarfile.TarFile, size: int, torn: list[str]) -> Iterator[TarMember]:
    """Yield the whole members of an archive; say in `torn` where it breaks off."""
    try:
        for info in archive:
            foreign = _foreign(info)
            if info.isdir() or (info.islnk() and info.linkname == info.name):  # tar names a file twice by such a link
                continue
            # tarfile turns bytes that are not UTF-8 into lone surrogates. They are spelled out (\xe9) to be printed.
            name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            if foreign is None and info.offset_data + info.size > size:
                torn.append(f"truncated: member {name} should end at byte {info.offset_data + info.size}, not {size}")
                return
            match = _KEY.fullmatch(name)
            if match:
                more, dot, extension = match[2].rpartition(".")
                length = info.size if foreign is None else 0
                yield TarMember(match[1], more + dot + extension.lower(), info.offset_data, length, foreign)
    except (tarfile.TarError, ValueError):
        pass  # the end marker is missing too: torn_end reports the place
    end = torn_end(archive)
    if end is not None and end.is_short:
        torn.append(f"truncated: ends at byte {size} without an end-of-archive block")
    elif end is not None and end.is_behind:
        where = f"from byte {end.byte} on, behind the end of the archive"
        torn.append(f"unread end: more data {where}, which no reader reaches")
    elif end is not None and end.zeros:
        torn.append(
            f"incomplete: {end.zeros:,} bytes of zeros from byte {end.byte} on, as in a download that was not completed"
        )
    elif end is not None:
        torn.append(f"damaged: no tar header at byte {end.byte}; the rest cannot be reached")


def _foreign(info: tarfile.TarInfo) -> str | None:
    """Say what a member is that is no plain file, whose data lie in one piece."""
    if info.islnk() or info.issym():
        return f"a link to {info.linkname.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')}"
    if info.issparse():
        return "a sparse file, whose data do not lie in one piece"
    return None if info.isfile() else "a device or pipe"


class TornEnd(NamedTuple):
    """How an archive breaks off at a byte.

    The file ends there (`is_short`), or what stands there is no header. is_behind: the archive has ended before, and
    data stand there that no reader reaches, as where one tar was appended to another. zeros: bytes of nothing but zeros
    there, more than pad an archive; else 0.
    """

    byte: int
    is_short: bool
    is_behind: bool = False
    zeros: int = 0


def torn_end(archive: tarfile.TarFile) -> TornEnd | None:
    """Return how an archive breaks off after its last member was read; None where it ends as archives do.

    tarfile takes any broken header but the first for the end of the archive: only a block of zeros is the end, and
    zeros alone may follow, and few of them: many stand where a download that was not completed has reserved the file.
    """
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        return TornEnd(archive.offset + len(block), is_short=True)
    if block.count(0) < BLOCK:
        return TornEnd(archive.offset, is_short=False)
    byte = archive.offset + BLOCK
    while data := file.read(1 << 20):
        if behind := data.lstrip(b"\0"):
            return TornEnd(byte + len(data) - len(behind), is_short=False, is_behind=True)
        byte += len(data)
    zeros = byte - archive.offset
    return TornEnd(archive.offset, is_short=False, zeros=zeros) if zeros > _MOST_PADDING else None


def _split_repeats(members: list[TarMember]) -> tuple[list[TarMember], list[TarMember]]:
    """Cut the members of one key where an extension of samples comes again: (first sample, others' first members)."""
    first: list[TarMember] = []
    repeats: list[TarMember] = []
    seen: set[str] = set()
    for member in members:
        if member.extension in (*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS):
            if member.extension in seen:
                repeats.append(member)
                seen.clear()
            seen.add(member.extension)
        if not repeats:
            first.append(member)
    return first, repeats
