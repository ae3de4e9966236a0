"""What a shard holds: which members make a sample, where they lie, and what cannot be used.

Members belong together by webdataset's rule: the same path up to the first dot of the file name, one after the other.
A sample is one picture (.jpg, .jpeg, .png, .webp) and one text (.json, or .txt, which becomes {"caption": text});
members of other extensions (`.mask.png` is one: the extension starts at the first dot) are left alone.
Where an extension comes a second time under one key, a second sample begins, which is rejected: keys name samples.
"""

import os
import re
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cosmos_scale.config import RemoteConfig
from cosmos_scale.data.decode.picture import decode_rgbx, picture_format
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.data.shards.mark import HEAD, mark_of
from cosmos_scale.data.shards.reader import (
    BLOCK,
    DEFAULT_REMOTE,
    IMAGE_EXTENSIONS,
    TEXT_EXTENSIONS,
    Entry,
    parse_text,
    refuse_compressed,
)
from cosmos_scale.data.shards.store import Transient, fetch_into, is_remote
from cosmos_scale.errors import UserError

# Most trailing junk after a JPEG's end marker is shorter; past it the picture is decoded to find out.
JPEG_TAIL = 4096

_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


class Rejected(NamedTuple):
    """A sample that cannot be used.

    byte: start of the picture's or text's header, the earlier one; without either, of the first member's header.
    """

    key: str
    reason: str
    byte: int


class ShardScan(NamedTuple):
    """What one shard holds; `torn` says where and how it breaks off, if it does. mark: as `mark_of` makes it."""

    size: int
    entries: list[Entry]
    rejected: list[Rejected]
    torn: str | None
    mark: str = ""


class _Member(NamedTuple):
    key: str
    extension: str
    offset: int
    size: int


def scan_shard(address: Path | str, shown: str | None = None, remote: RemoteConfig = DEFAULT_REMOTE) -> ShardScan:
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
            head = file.read(HEAD)
            refuse_compressed(name, head)
            return _scan(file)._replace(mark=mark_of(head))
    except Transient as failure:
        raise UserError(f"{name}: cannot be read: {failure}") from failure
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from error


def _scan(file: BinaryIO) -> ShardScan:
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    entries: list[Entry] = []
    rejected: list[Rejected] = []
    torn: list[str] = []
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
        except (tarfile.TarError, ValueError) as error:
            return ShardScan(size, [], [], f"not a tar file: {error}")
        for key, group in groupby(_members(archive, size, torn), key=lambda member: member.key):
            members, repeats = _split_repeats(list(group))
            image = _first(members, IMAGE_EXTENSIONS)
            text = _first(members, TEXT_EXTENSIONS)
            start = min(member.offset for member in (image, text) if member) if image or text else members[0].offset
            if image is None or text is None:
                missing = "no picture (.jpg, .jpeg, .png, .webp)" if image is None else "no text (.json, .txt)"
                rejected.append(Rejected(key, missing, start - BLOCK))
            elif fault := _picture_fault(file, image) or _text_fault(file, text):
                rejected.append(Rejected(key, fault, start - BLOCK))
            else:
                entries.append(Entry(key, image.offset, image.size, text.offset, text.size, text.extension))
            for repeat in repeats:
                byte = repeat.offset - BLOCK
                rejected.append(Rejected(key, f"duplicate key: again at byte {byte}", byte))
    return ShardScan(size, entries, rejected, torn[0] if torn else None)


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


def _text_fault(file: BinaryIO, member: _Member) -> str | None:
    try:
        document = parse_text(os.pread(file.fileno(), member.size, member.offset), member.extension)
    except DamagedSample as damage:
        return str(damage)
    # Which keys hold captions depends on the run's sampling. Without any string no sampling finds a caption.
    return None if holds_text(document) else f"empty text: no string in its {member.extension}"


def holds_text(document: dict[str, Any]) -> bool:
    """Whether any value of a document, however deep in it, is a string that is not blank."""
    values: list[Any] = [document]
    while values:  # no recursion: json may be nested deeper than Python's stack
        value = values.pop()
        if isinstance(value, str) and value.strip():
            return True
        if isinstance(value, (dict, list)):
            values.extend(value.values() if isinstance(value, dict) else value)
    return False
