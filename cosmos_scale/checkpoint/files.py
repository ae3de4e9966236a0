"""Files of float32 tensors in the safetensors format, with a checksum for each megabyte.

The format is the public one: other programs can read these files, and reading them runs no code. This module writes
files without the library, since the checksums are taken from the bytes on their way to the disk. It also reads them
without the library, since a reader checks all that it reads and reads no more than it needs: the chunks that its
tensors lie in, each chunk once.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosmos_scale.errors import UserError
from cosmos_scale.files import load_json, regular_only

CHUNK = 1 << 20  # bytes under one checksum
HEADER = 8  # bytes of the header's length


class BrokenCheckpoint(UserError):
    """A checkpoint whose files are not what was written; an older checkpoint may be whole."""


class GoneCheckpoint(BrokenCheckpoint):
    """A checkpoint whose folder was deleted after it was found; its run may have a newer one."""

    def __init__(self, folder: Path, key: str = "") -> None:
        """Key: the key that names the checkpoint, with a colon and a blank, where there is one."""
        self.folder = folder
        super().__init__(
            f"{key}checkpoint {folder}: deleted since it was found, as by its run, which keeps the newest; "
            "rule: name the run again, or let it keep more (checkpoint.keep_last)"
        )


def raise_if_gone(folder: Path, failure: Exception) -> None:
    """Raise GoneCheckpoint where a file of a checkpoint is missing since its folder, once found, is gone."""
    if isinstance(failure, FileNotFoundError) and not os.path.exists(folder):
        raise GoneCheckpoint(folder) from failure


class FileRecord(NamedTuple):
    """What a manifest says of a file: its name, its size in bytes, and the CRC-32 of each of its chunks."""

    name: str
    size: int
    checksums: list[int]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write [n] float32 CPU tensors, in their order, and wait until the disk has them; raises OSError."""
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        entries[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    checksums = _Checksums()
    with open(path, "wb", buffering=0, opener=regular_only) as file:
        for piece in _pieces(header, tensors):
            checksums.add(piece)
            while piece:  # an unbuffered file may take only a part at a time
                piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
    return FileRecord(path.name, HEADER + len(header) + end, checksums.finish())


def _pieces(header: bytes, tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    yield memoryview(len(header).to_bytes(HEADER, "little") + header)
    for tensor in tensors.values():
        # The format is little-endian, and so is every machine that torch runs on.
        yield tensor.detach().numpy().data.cast("B")


class _Checksums:
    """CRC-32 of each chunk of a stream."""

    def __init__(self) -> None:
        self._done: list[int] = []
        self._current, self._length = 0, 0

    def add(self, piece: memoryview) -> None:
        while piece:
            part = piece[: CHUNK - self._length]
            self._current = zlib.crc32(part, self._current)
            self._length += len(part)
            piece = piece[len(part) :]
            if self._length == CHUNK:
                self._done.append(self._current)
                self._current, self._length = 0, 0

    def finish(self) -> list[int]:
        return [*self._done, self._current] if self._length else self._done


class TensorFile:
    """Reads slices of the tensors of one file and checks them."""

    def __init__(self, folder: Path, record: FileRecord) -> None:
        """Open a file; raises BrokenCheckpoint where it is missing, of another size, or its header is damaged."""
        self.path = folder / record.name
        self._record = record
        self._chunk: tuple[int, bytes] = (-1, b"")  # the last chunk read: slices that follow each other share it
        try:
            self._file = open(self.path, "rb", buffering=0, opener=regular_only)  # noqa: SIM115 - stays open
        except OSError as failure:
            raise_if_gone(folder, failure)
            raise self._broken(failure.strerror or str(failure)) from failure
        try:
            self._entries, self._data = self._header()
        except BrokenCheckpoint:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def place(self, name: str) -> int:
        """Return at which byte of all tensors' data a tensor begins; raises BrokenCheckpoint."""
        return self._bytes_of(name)[0]

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out`, [n] float32 without a graph, with a tensor's elements from start on; raises BrokenCheckpoint."""
        first, last = self._bytes_of(name)
        if first + 4 * (start + out.numel()) > last:
            raise self._broken(f"has {(last - first) // 4} elements of {name!r}, not {start + out.numel()}")
        here = out if out.device.type == "cpu" and out.is_contiguous() else torch.empty(out.shape)
        self._read(self._data + first + 4 * start, here.numpy().data.cast("B"))
        if here is not out:
            out.copy_(here)

    def verify(self, advance: Callable[[int], None] = lambda count: None) -> None:
        """Read the whole file and check it; raises BrokenCheckpoint. advance: takes the bytes of each checked chunk."""
        for chunk in range(len(self._record.checksums)):
            advance(len(self._checked(chunk)))

    def _bytes_of(self, name: str) -> tuple[int, int]:
        if name not in self._entries:
            raise self._broken(f"has no tensor {name!r}")
        first, last = self._entries[name]["data_offsets"]
        return first, last

    def _header(self) -> tuple[dict[str, Any], int]:
        """Return what the file says of its tensors, and the byte at which the first tensor begins."""
        size = os.fstat(self._file.fileno()).st_size
        if size != self._record.size or len(self._record.checksums) != -(-size // CHUNK):
            raise self._broken(f"has {size} bytes, not the {self._record.size} that were written")
        begin = bytearray(min(HEADER, size))
        self._read(0, memoryview(begin))
        length = int.from_bytes(begin, "little")
        if not 0 < length <= size - HEADER:
            raise self._broken("has no header")
        header = bytearray(length)
        self._read(HEADER, memoryview(header))
        try:
            entries: dict[str, Any] = load_json(header)
        except ValueError as failure:
            raise self._broken("has no readable header") from failure
        return entries, HEADER + length

    def _read(self, start: int, out: memoryview) -> None:
        """Fill `out` with the file's bytes from start on."""
        end = start + len(out)
        for chunk in range(start // CHUNK, -(-end // CHUNK)):
            first = chunk * CHUNK
            low, high = max(start, first), min(end, first + CHUNK)
            out[low - start : high - start] = memoryview(self._checked(chunk))[low - first : high - first]

    def _checked(self, chunk: int) -> bytes:
        if self._chunk[0] != chunk:
            try:
                data = os.pread(self._file.fileno(), CHUNK, chunk * CHUNK)
            except OSError as failure:
                raise self._broken(failure.strerror or str(failure)) from failure
            if zlib.crc32(data) != self._record.checksums[chunk]:
                raise self._broken(f"is damaged between bytes {chunk * CHUNK} and {chunk * CHUNK + len(data)}")
            self._chunk = (chunk, data)
        return self._chunk[1]

    def _broken(self, reason: str) -> BrokenCheckpoint:
        return BrokenCheckpoint(f"checkpoint file {self.path}: {reason}; rule: it must be whole")
