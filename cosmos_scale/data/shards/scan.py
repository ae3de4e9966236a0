"""What a shard holds: which members make a sample, where they lie, and what cannot be used.

Members belong together by webdataset's rule: the same path up to the first dot of the file name, one after the other.
A sample is one picture (.jpg, .jpeg, .png, .webp) and one text (.json, or .txt, which becomes {"caption": text});
members of other extensions (`.mask.png` is one: the extension starts at the first dot) are left alone.
Where an extension comes a second time under one key, a second sample begins, which is rejected: keys name samples.
Two cases go beyond webdataset's rule, and take samples that the rule rejects. Where no extension from the first dot on
is one of the above, the key ends at the last dot (`www.a.org_1.jpg`). And members of one key that lie apart, such as
all pictures before all texts, are joined.
"""

import os
import re
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cosmos_scale.config import RemoteConfig
from cosmos_scale.data.decode.picture import decode_rgbx, picture_format
from cosmos_scale.data.samples.caption_keys import KNOWN_KEYS, caption_fault, has_text
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.data.shards.reader import (
    BLOCK,
    CLOSE,
    DEFAULT_REMOTE,
    IMAGE_EXTENSIONS,
    JSON_THEN_TXT,
    TEXT_EXTENSIONS,
    TXT_THEN_JSON,
    Entry,
    parse_text,
    refuse_compressed,
)
from cosmos_scale.data.shards.store import Transient, fetch_into, is_remote
from cosmos_scale.errors import UserError

# Most trailing junk after a JPEG's end marker is shorter; past it the picture is decoded to find out.
JPEG_TAIL = 4096

_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


class ScanRules(NamedTuple):
    """What the user says of shards that are scanned.

    captions: the only json keys that count as captions; none: the known ones. last_dot: all keys end at the last dot.
    """

    captions: tuple[str, ...] = ()
    last_dot: bool = False


DEFAULT_RULES = ScanRules()


class Rejected(NamedTuple):
    """A sample that cannot be used.

    byte: start of the picture's or text's header, the earlier one; without either, of the first member's header.
    """

    key: str
    reason: str
    byte: int


class ShardScan(NamedTuple):
    """What one shard holds; `torn` says where and how it breaks off, if it does."""

    size: int
    entries: list[Entry]
    rejected: list[Rejected]
    torn: str | None


class _Member(NamedTuple):
    key: str
    extension: str
    offset: int
    size: int

    @property
    def by_last_dot(self) -> "_Member":
        """The member with a key that ends at the last dot."""
        more, _, extension = self.extension.rpartition(".")
        return self._replace(key=f"{self.key}.{more}", extension=extension) if more else self

    @property
    def is_used(self) -> bool:
        """Whether the member's extension is one of a sample's."""
        return self.extension in (*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS)


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
                file: BinaryIO = stack.enter_context(tempfile.TemporaryFile())
                fetch_into(file, address, remote)
            else:
                file = stack.enter_context(open(address, "rb"))
            refuse_compressed(name, file.read(6))
            return _scan(file, rules)
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
    return ShardScan(size, samples.entries, samples.rejected, torn[0] if torn else None)


class _Samples:
    """The samples of one shard, made of groups of members that have one key and lie side by side."""

    def __init__(self, file: BinaryIO, rules: ScanRules) -> None:
        self.entries: list[Entry] = []
        self.rejected: list[Rejected] = []
        self._file, self._rules = file, rules
        self._incomplete: dict[str, list[list[_Member]]] = {}  # groups without picture, text or caption

    def add(self, group: list[_Member]) -> None:
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

    def _judge(self, members: list[_Member], repeats: list[_Member], *, alone: bool) -> bool:
        """Take the sample of some members, or reject it; False where members may be missing that lie elsewhere.

        repeats: first members of further samples of its key. alone: there are no members elsewhere.
        """
        key, image, text = members[0].key, _first(members, IMAGE_EXTENSIONS), _first(members, TEXT_EXTENSIONS)
        start = min(member.offset for member in (image, text) if member) if image or text else members[0].offset
        found: _Text | str | None = None
        if alone and (image is None or text is None):
            found = "no picture (.jpg, .jpeg, .png, .webp)" if image is None else "no text (.json, .txt)"
        elif image and text:
            found = _picture_fault(self._file, image) or _find_text(self._file, members, image, self._rules, alone)
            if isinstance(found, _Text):
                self.entries.append(Entry(key, image.offset, image.size, *found))
        if found is None:
            return False
        if isinstance(found, str):
            self.rejected.append(Rejected(key, found, start - BLOCK))
        for repeat in repeats:
            byte = repeat.offset - BLOCK
            self.rejected.append(Rejected(key, f"duplicate key: again at byte {byte}", byte))
        return True

    def _reject_dotted(self, group: list[_Member]) -> None:
        """Name what would be samples beside the group's own one if keys ended at the last dot."""
        for members in _by_key([member.by_last_dot for member in group if not member.is_used]):
            image, text = _first(members, IMAGE_EXTENSIONS), _first(members, TEXT_EXTENSIONS)
            if image and text:
                reason = f"key with dots: a part of {group[0].key}; --last-dot makes it a sample of its own"
                self.rejected.append(Rejected(members[0].key, reason, min(image.offset, text.offset) - BLOCK))


def _samples_in(group: list[_Member]) -> list[list[_Member]]:
    """Divide a group of one key: by the last dot where no extension from the first dot on is a sample's."""
    if not any(member.is_used for member in group):
        dotted = [member.by_last_dot for member in group]
        if any(member.is_used for member in dotted):
            return _by_key([member for member in dotted if member.is_used])
    return [group]


def _by_key(members: list[_Member]) -> list[list[_Member]]:
    groups: dict[str, list[_Member]] = {}
    for member in members:
        groups.setdefault(member.key, []).append(member)
    return list(groups.values())


def _members(archive: tarfile.TarFile, size: int, torn: list[str]) -> Iterator[_Member]:
    """Yield the whole members of an archive; say in `torn` where it breaks off."""
    try:
        for info in archive:
            if not info.isfile() or info.issparse():
                continue
            # tarfile turns bytes that are not UTF-8 into lone surrogates. They are spelled out (\xe9) to be printed.
            name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            if info.offset_data + info.size > size:
                torn.append(f"truncated: member {name} should end at byte {info.offset_data + info.size}, not {size}")
                return
            match = _KEY.fullmatch(name)
            if match:
                yield _Member(match[1], match[2].lower(), info.offset_data, info.size)
    except (tarfile.TarError, ValueError):
        pass  # the end marker is missing too: torn_end reports the place
    end = torn_end(archive)
    if end is not None and end.is_short:
        torn.append(f"truncated: ends at byte {size} without an end-of-archive block")
    elif end is not None:
        torn.append(f"damaged: no tar header at byte {end.byte}; the rest cannot be reached")


class TornEnd(NamedTuple):
    """How an archive breaks off: the file ends at a byte (`is_short`), or what stands at the byte is no header."""

    byte: int
    is_short: bool


def torn_end(archive: tarfile.TarFile) -> TornEnd | None:
    """Return how an archive breaks off after its last member was read; None where it ends as archives do.

    tarfile takes any broken header but the first for the end of the archive: only a block of zeros is the end.
    """
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(BLOCK)
    if len(block) < BLOCK:
        return TornEnd(archive.offset + len(block), is_short=True)
    return None if block.count(0) == BLOCK else TornEnd(archive.offset, is_short=False)


def _split_repeats(members: list[_Member]) -> tuple[list[_Member], list[_Member]]:
    """Cut the members of one key where an extension of samples comes again: (first sample, others' first members)."""
    first: list[_Member] = []
    repeats: list[_Member] = []
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


def _first(members: list[_Member], extensions: tuple[str, ...]) -> _Member | None:
    """The first member with one of some extensions, which are in order of preference."""
    return next((member for extension in extensions for member in members if member.extension == extension), None)


def _picture_fault(file: BinaryIO, member: _Member) -> str | None:
    """What is wrong with a picture, judged by its first and last bytes. Decoding shows damage between them."""
    descriptor = file.fileno()
    kind = picture_format(os.pread(descriptor, min(12, member.size), member.offset))
    if kind is None:
        return "not a JPEG, PNG or WebP picture"
    tail = min(JPEG_TAIL, member.size)
    if kind == "jpeg" and b"\xff\xd9" not in os.pread(descriptor, tail, member.offset + member.size - tail):
        try:  # without an end marker the picture is cut off, or a camera's own data follows it
            decode_rgbx(os.pread(descriptor, member.size, member.offset), sys.maxsize)
        except DamagedSample as damage:
            return f"damaged JPEG: {damage}"
    return None


class _Text(NamedTuple):
    """The fields of an Entry that say where a sample's text lies."""

    offset: int
    size: int
    kind: str


def _find_text(
    file: BinaryIO, members: list[_Member], image: _Member, rules: ScanRules, alone: bool
) -> _Text | str | None:
    """Return the text to read of a sample with a json, a txt or both; or what is wrong with it.

    None: a json has no caption, and where members lie elsewhere (not `alone`) a txt may be among these.

    Of both, the json alone is read if it has a caption. Otherwise the txt has the caption, and both are read where they
    lie near each other: the json may say more.
    """
    json_member, txt_member = _first(members, ("json",)), _first(members, ("txt",))
    member = json_member or txt_member
    assert member is not None
    document = _parsed(file, member)
    fault = document if isinstance(document, str) else _text_fault(document, member, rules)
    keys = rules.captions or KNOWN_KEYS
    # A title or another such text of the json is no caption where there is a txt.
    if json_member and (isinstance(document, str) or not any(has_text(document.get(key)) for key in keys)):
        if txt_member is None and not alone:
            return None
        words = _parsed(file, txt_member) if txt_member else ""
        if txt_member and not isinstance(words, str) and has_text(words["caption"]) and "caption" in keys:
            return _span(txt_member, None if isinstance(document, str) else json_member, image)
    return fault or _Text(member.offset, member.size, member.extension)


def _parsed(file: BinaryIO, member: _Member) -> dict[str, Any] | str:
    """The document of a json or txt, or what is wrong with the member."""
    try:
        return parse_text(os.pread(file.fileno(), member.size, member.offset), member.extension)
    except DamagedSample as damage:
        return str(damage)


def _text_fault(document: dict[str, Any], member: _Member, rules: ScanRules) -> str | None:
    # Which keys hold captions depends on the run's sampling. Without any string no sampling finds a caption.
    if not rules.captions and not _holds_text(document):
        return f"empty text: no string in its {member.extension}"
    return caption_fault(document, rules.captions)


def _span(txt: _Member, json: _Member | None, image: _Member) -> _Text:
    """Where to read a txt, and a json too that lies so near that one read takes both.

    The picture may lie between txt and json: it is read with them anyway.
    """
    if json is not None:
        first, last = sorted((txt, json), key=attrgetter("offset"))
        size = last.offset + last.size - first.offset
        between = image.size if first.offset < image.offset < last.offset else 0
        if size <= first.size + last.size + between + CLOSE:
            return _Text(first.offset, size, TXT_THEN_JSON if first is txt else JSON_THEN_TXT)
    return _Text(txt.offset, txt.size, txt.extension)


def _holds_text(document: dict[str, Any]) -> bool:
    values: list[Any] = [document]
    while values:  # no recursion: json may be nested deeper than Python's stack
        value = values.pop()
        if isinstance(value, str) and value.strip():
            return True
        if isinstance(value, (dict, list)):
            values.extend(value.values() if isinstance(value, dict) else value)
    return False
