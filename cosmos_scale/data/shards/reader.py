"""Shards: tar files of samples, read by offset, wherever they lie."""

import errno
import os
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cosmos_scale.config import RemoteConfig
from cosmos_scale.data.samples.document import parse_json
from cosmos_scale.data.samples.file_kind import POINTER, compression_of
from cosmos_scale.data.samples.sample import DamagedSample, UnreachableShard
from cosmos_scale.data.shards.cache import ShardCache
from cosmos_scale.data.shards.mark import HEAD, is_other
from cosmos_scale.data.shards.store import (
    PIPE,
    NoParts,
    Stores,
    Transient,
    WrongSize,
    is_remote,
    redact,
    retried,
)
from cosmos_scale.errors import UserError
from cosmos_scale.files import reason_of, regular_only
from cosmos_scale.words import with_article

BLOCK = 512  # bytes; every tar header is one block, data start and end at block boundaries
IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp")  # in order of preference, which is the published loader's
TEXT_EXTENSIONS = ("json", "txt")  # in order of preference: img2dataset writes both, and the json says more
# Kinds of text whose bytes reach from the first of two members to the end of the second, headers between them included.
JSON_THEN_TXT, TXT_THEN_JSON = "j+t", "t+j"
MARKED = 64  # shards whose marks are compared before a run
OPEN_SHARDS = 64  # files kept open per process: a window of the order spans a few dozen shards
CLOSE = 64 * 1024  # most bytes between a sample's members that are read along with them, in one request for both
DEFAULT_REMOTE = RemoteConfig()
# Errors of files on a network mount while its server is away. ENOENT: the mount itself is gone.
MAY_PASS = (
    errno.ENOENT,
    errno.ESTALE,
    errno.EIO,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EREMOTEIO,
)


# Servers of which this process has said that they send whole shards only; forked processes know it too.
_SAID_WITHOUT_PARTS: set[str] = set()


class Entry(NamedTuple):
    """One usable sample of a shard: where its picture and text lie, in bytes.

    text_kind: json or txt, or both members in their order, where the json has no caption.
    """

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


class OldIndex(UserError):
    """A shard is not the one that was indexed: it has another size, or begins with other bytes."""


class ShardFile(NamedTuple):
    """One shard of a source. size: bytes that it had when it was indexed. address: its path or URL, or pipe:COMMAND.

    shown: the address for messages and records, without secrets. mark: its mark when it was indexed; empty: not known.
    table: of a shard elsewhere, a digest of its table; empty before the table is opened.
    """

    source: str
    shown: str
    size: int
    address: str
    mark: str = ""
    table: str = ""


class Location(NamedTuple):
    """Where one sample of the merged index lies."""

    file: ShardFile
    entry: Entry

    @property
    def source(self) -> str:
        """The source's name."""
        return self.file.source

    @property
    def shard(self) -> str:
        """The shard's path or URL for messages and records."""
        return self.file.shown


def refuse_other_kinds(path: Path | str, head: bytes) -> None:
    """Raise UserError where a shard is compressed, or a pointer, by its first bytes (a hundred or more)."""
    if kind := compression_of(head):
        raise UserError(f"{path}: is {kind}-compressed; samples are read by offset, so unpack it to a plain .tar")
    if head.startswith(POINTER):
        raise UserError(f"{path}: is a pointer of Git LFS, no shard; rule: fetch the file itself (git lfs pull)")


def parse_text(data: bytes, kind: str) -> dict[str, Any]:
    """Turn a sample's text member (`kind`: json or txt) into its document.

    Raises: DamagedSample where it is not UTF-8, not json, or json that is not an object; where `parse_json` refuses the
    json; and where a txt holds NUL, as files do that a power cut left full of zeros.
    """
    try:
        if kind == "txt":
            if b"\0" in data:
                raise DamagedSample(f"unreadable txt: NUL at byte {data.index(0)}")
            return {"caption": data.decode("utf-8-sig").strip()}  # Windows' editors begin a text with a mark
        document = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise DamagedSample(f"unreadable {kind}: {error}") from error
    if not isinstance(document, dict):
        raise DamagedSample(f"json is {with_article(type(document).__name__)}, not an object")
    return document


class Folders:
    """Looks for files by listing their folders: on a far disk, to ask for thousands of files one by one takes long."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def require(self, path: str) -> None:
        """Raise OSError where there is no such file."""
        folder, name = os.path.split(path)
        if folder not in self._names:
            self._names[folder] = set(os.listdir(folder or "."))
        if name not in self._names[folder]:
            os.stat(path)  # raises, with the reason


class ShardReader:
    """Reads samples by offset, and knows which shards can no longer be reached.

    Shards of this machine: the files that were used most recently are kept open.
    Shards elsewhere: where the store has ranges, only a sample's bytes are fetched, picture and text in one request
    where they lie side by side. Otherwise, or with data.remote.fetch: shards, the whole shard is fetched into
    data.remote.cache and read there.
    Errors that may pass (see `Transient`; a missing file is such an error) are followed by another try, after waits
    that double.

    A reader belongs to one process. Each worker makes its own reader, or gets one by forking.
    """

    def __init__(self, remote: RemoteConfig = DEFAULT_REMOTE, open_shards: int = OPEN_SHARDS) -> None:
        self._remote = remote
        self._open_shards = open_shards
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()
        self._stores = Stores(remote)
        self._cache = None if remote.cache is None else ShardCache(remote.cache, int(remote.cache_gb * 1e9))
        self._without_parts: set[str] = set()
        self._lost: dict[str, str] = {}

    def check(self, shards: Iterable[ShardFile]) -> None:
        """Look for shards before a run.

        A shard that differs from its index before the run never fitted it, which is the user's error. Shards that go
        missing or change later are lost, which `read` says. The look covers all files of this machine (by listing
        their folders), and the first shard of each source that lies elsewhere: to ask for thousands takes minutes.
        Marks are compared of MARKED shards of this machine at most, spread over all.
        Raises: UserError where a shard is missing, has another size or mark, or needs a cache and there is none.
        """
        folders = Folders()
        asked: set[str] = set()
        shards = list(shards)
        every = -(-len(shards) // MARKED)
        for place, shard in enumerate(shards):
            if is_remote(shard.address):
                if shard.source not in asked:
                    self._probe(shard)
                asked.add(shard.source)
                continue
            try:
                folders.require(shard.address)
                size = os.stat(shard.address).st_size
            except OSError as error:
                raise _no_access(shard, reason_of(error)) from error
            if size != shard.size:
                raise _stale(shard, str(size))
            if shard.mark and place % every == 0:
                with _opened(shard) as file:
                    _check_mark(shard, file.read(HEAD))
        self._stores.close()

    def is_same(self, shard: ShardFile) -> bool:
        """Whether a shard can be read and is the one that was indexed, as far as its size and mark tell."""
        try:
            self.check([shard])
        except UserError:
            return False
        return True

    def read(self, location: Location) -> tuple[bytes, dict[str, Any]]:
        """Return a sample's picture, undecoded, and its document.

        Raises: UnreachableShard where the shard cannot be reached after all retries, or has another size than its
        index says; UserError where the shard must not be read; DamagedSample where the members do not lie where the
        index says.
        """
        entry = location.entry
        # The member's header, just before its data, is read too: the header tells whether the index still fits.
        image = entry.image_offset - BLOCK, BLOCK + entry.image_size
        text = entry.text_offset - BLOCK, BLOCK + entry.text_size
        start, end = min(image[0], text[0]), max(sum(image), sum(text))
        if start < 0 or min(entry.image_size, entry.text_size) < 0 or end > location.file.size:
            raise DamagedSample("its line of the index names bytes that the shard does not have: the index is damaged")
        if end - start <= image[1] + text[1] + CLOSE:
            data = self._bytes(location.file, start, end - start)
            image_data, text_data = (data[offset - start : offset - start + size] for offset, size in (image, text))
        else:
            image_data, text_data = (self._bytes(location.file, *span) for span in (image, text))
        document = _document(text_data, entry)
        return _member(image_data, entry.image_offset, entry.image_size), document

    def close(self) -> None:
        """Close every open shard and connection."""
        while self._files:
            self._files.popitem()[1].close()
        self._stores.close()

    def _bytes(self, shard: ShardFile, offset: int, size: int) -> bytes:
        if shard.address in self._lost:
            raise UnreachableShard(shard.source, shard.shown, self._lost[shard.address])
        read = self._remote_bytes if is_remote(shard.address) else self._local_bytes
        try:
            return retried(lambda: read(shard, offset, size), self._remote, await_missing=True)
        except Transient as failure:
            reason = _other_size(shard, failure.found) if isinstance(failure, WrongSize) else str(failure)
            self._lost[shard.address] = reason  # for the shard's next sample nothing is tried again
            raise UnreachableShard(shard.source, shard.shown, reason) from failure

    def _remote_bytes(self, shard: ShardFile, offset: int, size: int) -> bytes:
        store = self._stores.of(shard.address)
        if self._remote.fetch == "parts" and _server(shard.address) not in self._without_parts:
            try:
                return store.read(shard.address, offset, size, shard.size)
            except NoParts:
                self._note_without_parts(shard)
        assert self._cache is not None  # a rule between config keys, or else _note_without_parts, has made sure
        # Once a shard that was written anew is indexed again, its old copy in the cache is no longer asked for.
        version = f"{shard.address} {shard.mark} {shard.table}"
        return self._cache.read(version, shard.size, offset, size, lambda: store.pieces(shard.address, shard.size))

    def _probe(self, shard: ShardFile) -> None:
        try:
            store = self._stores.of(shard.address)
            _check_mark(shard, retried(lambda: store.read(shard.address, 0, BLOCK, shard.size), self._remote))
        except NoParts:
            self._note_without_parts(shard)
        except WrongSize as wrong:
            raise _stale(shard, wrong.found) from wrong
        except Transient as failure:
            raise _no_access(shard, str(failure)) from failure

    def _note_without_parts(self, shard: ShardFile) -> None:
        """Remember that a server sends whole shards only, and say so once where parts were hoped for."""
        if self._cache is None:
            raise UserError(f"data.remote.cache: null; must name a folder: {shard.shown} comes whole only")
        server = _server(shard.address)
        if server not in _SAID_WITHOUT_PARTS and server != PIPE and self._remote.fetch == "parts":
            note = f"serves no byte ranges, so that whole shards are kept in data.remote.cache, {self._cache.folder}"
            print(f"{redact(server)}: {note}", file=sys.stderr)
            _SAID_WITHOUT_PARTS.add(server)
        self._without_parts.add(server)

    def _local_bytes(self, shard: ShardFile, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._file(shard).fileno(), size, offset)
        except OSError as error:
            if shard.address in self._files:
                self._files.pop(shard.address).close()
            reason = reason_of(error)
            if error.errno in MAY_PASS:
                raise Transient(reason) from error
            raise _no_access(shard, reason) from error

    def _file(self, shard: ShardFile) -> BinaryIO:
        file = self._files.get(shard.address)
        if file is not None:
            self._files.move_to_end(shard.address)
            return file
        file = open(shard.address, "rb", buffering=0, opener=regular_only)  # noqa: SIM115 - stays open
        size = os.fstat(file.fileno()).st_size
        if size != shard.size:
            file.close()
            raise WrongSize(str(size), final=True)
        self._files[shard.address] = file
        if len(self._files) > self._open_shards:
            self._files.popitem(last=False)[1].close()
        return file


def _member(data: bytes, offset: int, size: int) -> bytes:
    """Return a member's data from bytes that start with the member's header; raises DamagedSample where they do not."""
    # Bytes 124 to 135 of a header hold the member's size.
    if len(data) != BLOCK + size or _header_number(data[124:136]) != size:
        raise DamagedSample(f"no member of {size} bytes at byte {offset}: the shard has changed or is damaged")
    return data[BLOCK:]


def _document(data: bytes, entry: Entry) -> dict[str, Any]:
    """Return a sample's document from bytes that start with its text's header; a txt is its caption."""
    if entry.text_kind not in (JSON_THEN_TXT, TXT_THEN_JSON):
        return parse_text(_member(data, entry.text_offset, entry.text_size), entry.text_kind)
    first, last = _first_and_last(data, entry)
    json_data, txt_data = (first, last) if entry.text_kind == JSON_THEN_TXT else (last, first)
    return parse_text(json_data, "json") | parse_text(txt_data, "txt")


def _first_and_last(data: bytes, entry: Entry) -> tuple[bytes, bytes]:
    """Return the data of the first and the last of the members that some bytes hold; raises DamagedSample."""
    found = []
    position, end = 0, BLOCK + entry.text_size
    while position < end == len(data):
        size = _header_number(data[position + 124 : position + 136])
        if size is None or position + BLOCK + size > end:
            break
        found.append(data[position + BLOCK : position + BLOCK + size])
        if position + BLOCK + size == end:
            return found[0], found[-1]
        position += BLOCK + -(-size // BLOCK) * BLOCK
    raise DamagedSample(f"no two members at byte {entry.text_offset}: the shard has changed or is damaged")


def _header_number(field: bytes) -> int | None:
    """The number in a header's field: octal digits (POSIX ustar), or behind a byte 0x80 base 256 (GNU).

    Some writers of tars pad the digits with zeros, some with spaces.
    """
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0"), 8)
    except ValueError:
        return None


def _server(address: str) -> str:
    return PIPE if address.startswith(PIPE) else "/".join(address.split("/", 3)[:3])


def _no_access(shard: ShardFile, reason: str) -> UserError:
    return UserError(f"{shard.shown}: shard of source {shard.source} cannot be opened: {reason}")


@contextmanager
def _opened(shard: ShardFile) -> Iterator[BinaryIO]:
    try:
        with open(shard.address, "rb", buffering=0, opener=regular_only) as file:
            yield file
    except OSError as error:
        raise _no_access(shard, reason_of(error)) from error


def _check_mark(shard: ShardFile, head: bytes) -> None:
    """Raise UserError where a shard begins with other bytes than the shard that was indexed."""
    if shard.mark and is_other(shard.mark, head):
        raise OldIndex(
            f"{shard.shown}: is another shard than the one of this name and size that was indexed; run "
            "`cosmos-scale data index` again, into a folder of its own (--out) if the index is of other shards"
        )


def _stale(shard: ShardFile, found: str) -> OldIndex:
    return OldIndex(f"{shard.shown}: {_other_size(shard, found)}; run `cosmos-scale data index` again")


def _other_size(shard: ShardFile, found: str) -> str:
    return f"has {found} bytes, but its index was made when it had {shard.size}"
