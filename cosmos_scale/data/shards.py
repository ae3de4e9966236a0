"""Shards: tar files of samples. Which members make a sample, where they lie, and reading them by offset.

Members belong together by webdataset's rule: the same path up to the first dot of the file name, one after the other.
A sample is one picture (.jpg, .jpeg, .png, .webp) and one text (.json, or .txt, which becomes {"caption": text});
members of other extensions (`.mask.png` is one: the extension starts at the first dot) are left alone.
Where an extension comes a second time under one key, a second sample begins, which is rejected: keys name samples.
"""

import json
import os
import re
import sys
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from cosmos_scale.data.decode.picture import decode_rgbx
from cosmos_scale.data.sample import DamagedSample
from cosmos_scale.errors import UserError

BLOCK = 512  # bytes; every tar header is one block, data start and end at block boundaries
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEXT_EXTENSIONS = ("json", "txt")  # in order of preference: img2dataset writes both, and the json says more
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
OPEN_SHARDS = 64  # files kept open per process: a window of the order spans a few dozen shards
# Most trailing junk after a JPEG's end marker is shorter; past it the picture is decoded to find out.
JPEG_TAIL = 4096

_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


class Entry(NamedTuple):
    """One usable sample of a shard: where its picture and text lie, in bytes."""

    key: str
    image_offset: int
    image_size: int
    text_offset: int
    text_size: int
    text_kind: str

    @property
    def start(self) -> int:
        """The byte where the header of the first of both members starts."""
        return min(self.image_offset, self.text_offset) - BLOCK


class Rejected(NamedTuple):
    """A sample that cannot be used; the header of its first member, picture or text if it has any, starts at `byte`."""

    key: str
    reason: str
    byte: int


class ShardScan(NamedTuple):
    """What one shard holds; `torn` says where and how it breaks off, if it does."""

    size: int
    entries: list[Entry]
    rejected: list[Rejected]
    torn: str | None


class Location(NamedTuple):
    """Where one sample of the merged index lies; `shard_size` (bytes) is what the shard had when it was indexed."""

    source: str
    shard: Path
    shard_size: int
    entry: Entry


class _Member(NamedTuple):
    key: str
    extension: str
    offset: int
    size: int


def scan_shard(path: Path) -> ShardScan:
    """Read a shard's headers and texts, not its pixels, and list its samples in order.

    Raises: UserError where the shard is missing, compressed or cannot be read.
    """
    try:
        with path.open("rb") as file:
            refuse_compressed(path, file.read(6))
            return _scan(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def refuse_compressed(path: Path, head: bytes) -> None:
    """Raise UserError where a file's first bytes (six or more) are those of a compressed archive."""
    for magic, kind in COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(f"{path}: is {kind}-compressed; samples are read by offset, so unpack it to a plain .tar")


def picture_format(head: bytes) -> Literal["jpeg", "png", "webp"] | None:
    """Tell a picture's format from its first 12 bytes; None for anything that is not read here."""
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    return None


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
            if info.offset_data + info.size > size:
                torn.append(
                    f"truncated: member {info.name} should end at byte {info.offset_data + info.size}, not {size}"
                )
                return
            match = _KEY.fullmatch(info.name)
            if match:
                yield _Member(match[1], match[2].lower(), info.offset_data, info.size)
    except (tarfile.TarError, ValueError):
        pass  # the end marker is missing too, which the check below reports with its place
    # tarfile takes any broken header but the first for the end of the archive: only a block of zeros is one.
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(BLOCK)
    if len(block) < BLOCK:
        torn.append(f"truncated: ends at byte {size} without an end-of-archive block")
    elif block.count(0) != BLOCK:
        torn.append(f"damaged: no tar header at byte {archive.offset}; the rest cannot be reached")


def _split_repeats(members: list[_Member]) -> tuple[list[_Member], list[_Member]]:
    """Cut members of one key where an extension of samples comes again: (first sample, first member of the others)."""
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
    """The first member with one of these extensions, which are in order of preference."""
    return next((member for extension in extensions for member in members if member.extension == extension), None)


def _picture_fault(file: BinaryIO, member: _Member) -> str | None:
    """What is wrong with a picture as far as its ends tell: damage inside shows when it is decoded."""
    descriptor = file.fileno()
    kind = picture_format(os.pread(descriptor, min(12, member.size), member.offset))
    if kind is None:
        return "not a JPEG, PNG or WebP picture"
    tail = min(JPEG_TAIL, member.size)
    if kind == "jpeg" and b"\xff\xd9" not in os.pread(descriptor, tail, member.offset + member.size - tail):
        try:  # no end marker: cut off, or followed by a camera's own data
            decode_rgbx(os.pread(descriptor, member.size, member.offset), sys.maxsize)
        except DamagedSample as damage:
            return f"damaged JPEG: {damage}"
    return None


def _text_fault(file: BinaryIO, member: _Member) -> str | None:
    try:
        document = parse_text(os.pread(file.fileno(), member.size, member.offset), member.extension)
    except DamagedSample as damage:
        return str(damage)
    # Which keys hold captions depends on the run's sampling; without any string no sampling finds one.
    return None if _holds_text(document) else f"empty text: no string in its {member.extension}"


def _holds_text(document: dict[str, Any]) -> bool:
    values: list[Any] = [document]
    while values:  # no recursion: json may be nested deeper than Python's stack
        value = values.pop()
        if isinstance(value, str) and value.strip():
            return True
        if isinstance(value, (dict, list)):
            values.extend(value.values() if isinstance(value, dict) else value)
    return False


def parse_text(data: bytes, kind: str) -> dict[str, Any]:
    """Turn a sample's text member (`kind`: json or txt) into its document.

    Raises: DamagedSample where it is not UTF-8, not json, or json that is not an object.
    """
    try:
        if kind == "txt":
            return {"caption": data.decode("utf-8").strip()}
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedSample(f"unreadable {kind}: {error}") from error
    if not isinstance(document, dict):
        raise DamagedSample(f"json is a {type(document).__name__}, not an object")
    return document


class ShardReader:
    """Reads samples by offset, with one system call a member; keeps the most recently used shards open.

    Belongs to one process: make one in each worker.
    """

    def __init__(self, open_shards: int = OPEN_SHARDS) -> None:
        self._open_shards = open_shards
        self._files: OrderedDict[Path, BinaryIO] = OrderedDict()

    def read(self, location: Location) -> tuple[bytes, dict[str, Any]]:
        """Return a sample's picture, undecoded, and its document.

        Raises: UserError where the shard is missing or has another size than its index says; DamagedSample where the
        members cannot be read or do not lie where the index says.
        """
        entry = location.entry
        image = self._member(location, entry.image_offset, entry.image_size)
        text = self._member(location, entry.text_offset, entry.text_size)
        return image, parse_text(text, entry.text_kind)

    def close(self) -> None:
        """Close every open shard."""
        while self._files:
            self._files.popitem()[1].close()

    def _member(self, location: Location, offset: int, size: int) -> bytes:
        descriptor = self._file(location).fileno()
        try:  # the header before the data comes along: it tells whether the index still fits
            data = os.pread(descriptor, BLOCK + size, offset - BLOCK)
        except OSError as error:
            raise DamagedSample(f"read error at byte {offset}: {error.strerror}") from error
        # Bytes 124 to 135 of a header hold the member's size in octal digits (POSIX ustar).
        if len(data) != BLOCK + size or data[124:135] != b"%011o" % size:
            raise DamagedSample(f"no member of {size} bytes at byte {offset}: the shard has changed or is damaged")
        return data[BLOCK:]

    def _file(self, location: Location) -> BinaryIO:
        file = self._files.get(location.shard)
        if file is not None:
            self._files.move_to_end(location.shard)
            return file
        try:
            file = location.shard.open("rb", buffering=0)
        except OSError as error:
            raise UserError(
                f"{location.shard}: shard of source {location.source} cannot be opened: {error.strerror}"
            ) from error
        size = os.fstat(file.fileno()).st_size
        if size != location.shard_size:
            file.close()
            raise UserError(
                f"{location.shard}: has {size} bytes, but its index was made when it had {location.shard_size}; "
                "run `cosmos-scale data index` again"
            )
        self._files[location.shard] = file
        if len(self._files) > self._open_shards:
            self._files.popitem(last=False)[1].close()
        return file
