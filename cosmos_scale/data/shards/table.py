"""The table of one shard's samples, a `.index.npy`: where each sample lies, so that no other need be read."""

import errno
import hashlib
import io
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cosmos_scale.config import RemoteConfig
from cosmos_scale.data.shards.reader import DEFAULT_REMOTE, MAY_PASS, Entry
from cosmos_scale.data.shards.store import Transient, fetch_into, is_remote, redact, retried
from cosmos_scale.errors import UserError
from cosmos_scale.files import read_regular, reason_of, regular_only

SampleTable = NDArray[np.void]

_NUMBERS = ("image_offset", "image_size", "text_offset", "text_size")
_ONCE = RemoteConfig(retries=0)


class NoTable(Transient):
    """A file that is no table, or a damaged table."""

    final = True


def table_name(shard: str) -> str:
    """Return the file of a shard's table, in the folder of the index."""
    return shard.removesuffix(".tar") + ".index.npy"


def refuse_one_table(names: Sequence[str], show: Callable[[str], str]) -> None:
    """Raise UserError where two shards of an index would have one table, as `a` and `a.tar`. show: for messages."""
    shards: dict[str, str] = {}
    for name in names:
        other = shards.setdefault(table_name(name), name)
        if other != name:
            raise UserError(
                f"{show(other)} and {show(name)}: both would have the table {table_name(name)} in one index; rule: "
                "rename one, or index it with --out in a folder of its own"
            )


def pack_table(entries: Sequence[Entry]) -> bytes:
    """Return the file of a shard's table."""
    keys = [entry.key.encode() for entry in entries]
    columns = [
        ("key", f"S{max(map(len, keys), default=1)}"),
        *((name, "<i8") for name in _NUMBERS),
        ("text_kind", "S4"),
    ]
    rows = [(key, *entry[1:-1], entry.text_kind.encode()) for key, entry in zip(keys, entries, strict=True)]
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, dtype=columns))
    return buffer.getvalue()


def open_table(path: str, remote: RemoteConfig | None = None) -> SampleTable:
    """Memory-map a table, or fetch a table that lies at a URL.

    remote: how often to try again; None: do not wait for a file to come back.
    Raises: Transient where the table cannot be read after all retries; UserError where it must not be read.
    """
    if is_remote(path):
        return _parsed(io.BytesIO(read_whole(path, remote)))
    return retried(lambda: _parsed(path), remote or _ONCE, await_missing=True)


def entry_of(table: SampleTable, place: int) -> Entry:
    """Return one sample of a table; bytes of the sample's key that are no UTF-8 are spelled out (\\xe9)."""
    key, image_offset, image_size, text_offset, text_size, kind = table[place].item()
    shown = key.decode("utf-8", "backslashreplace")
    return Entry(shown, image_offset, image_size, text_offset, text_size, kind.decode("ascii", "replace"))


def table_digest(table: SampleTable) -> str:
    """Return a digest of where a shard's samples lie; captions or pictures of other lengths change it."""
    return hashlib.sha256(table.tobytes()).hexdigest()[:16]


def read_whole(path: str, remote: RemoteConfig | None = None) -> bytes:
    """Return a file of an index, which may lie at a URL.

    remote: how often to try again where reading fails in a way that may pass; None: of this machine's files not at all.
    Raises: Transient where all tries fail; OSError of a file of this machine in any other case.
    """
    if is_remote(path):
        buffer = io.BytesIO()
        fetch_into(buffer, path, remote or DEFAULT_REMOTE)
        return buffer.getvalue()

    def attempt() -> bytes:
        try:
            return read_regular(path)
        except OSError as error:
            if error.errno in MAY_PASS and error.errno != errno.ENOENT:
                raise Transient(error.strerror or str(error)) from error
            raise

    return retried(attempt, remote or _ONCE)


def _parsed(file: str | io.BytesIO) -> SampleTable:
    try:
        if isinstance(file, str):
            with open(file, "rb", opener=regular_only):  # to map a FIFO would wait for ever
                table: SampleTable = np.lib.format.open_memmap(file, mode="r")
        else:
            table = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        reason = reason_of(error)
        if error.errno in MAY_PASS:
            raise Transient(reason) from error
        raise UserError(f"{redact(str(file))}: index cannot be read: {reason}") from error
    except Exception as error:  # numpy raises errors of many kinds for bytes that are no table
        raise NoTable("damaged") from error
    if table.ndim != 1 or table.dtype.names != ("key", *_NUMBERS, "text_kind"):
        raise NoTable("no table of samples")
    return table
