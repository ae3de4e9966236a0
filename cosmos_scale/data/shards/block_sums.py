"""Checksums of the blocks of a cached shard, kept behind its bytes: a read sees damage of the local disk.

The checksums are of the bytes that came from the shard's store. So a shard that is damaged there has sound checksums.
CRC-32 of zlib, in little-endian order: a block of zeros has one that is not 0, so that a file that a power cut left
full of zeros does not fit itself.
"""

import errno
import os
from array import array
from sys import byteorder
from zlib import crc32

BLOCK = 16 << 10  # bytes: a read checks whole blocks, of which the first and the last may hold other samples' bytes
_SUM = 4  # bytes


class BlockSums:
    """Takes a shard piece by piece, in order, and makes its checksums."""

    def __init__(self) -> None:
        self._sums = array("I")
        self._crc = self._length = 0  # of the block that is not full yet

    def add(self, piece: bytes) -> None:
        """Take the next bytes of the shard."""
        view = memoryview(piece)
        while view:
            part = view[: BLOCK - self._length]
            self._crc = crc32(part, self._crc)
            self._length += len(part)
            view = view[len(part) :]
            if self._length == BLOCK:
                self._close_block()

    def packed(self) -> bytes:
        """Return the checksums of all bytes so far, `sums_size` of them; no more bytes may come."""
        if self._length:
            self._close_block()
        return _little_endian(self._sums).tobytes()

    def _close_block(self) -> None:
        self._sums.append(self._crc)
        self._crc = self._length = 0


def sums_size(total: int) -> int:
    """Return the bytes of the checksums of a shard of `total` bytes."""
    return _SUM * -(-total // BLOCK)


def read_checked(descriptor: int, total: int, offset: int, size: int) -> bytes | None:
    """Read a part of a shard of `total` bytes from a file that holds its checksums behind them.

    Returns None where the part is not what was written: its bytes have changed, the file was cut, or the disk cannot
    read them. Raises: OSError for other reasons.
    """
    first, end = offset // BLOCK, -(-min(offset + size, total) // BLOCK)
    start = first * BLOCK
    try:
        data = os.pread(descriptor, min(end * BLOCK, total) - start, start)
        packed = os.pread(descriptor, (end - first) * _SUM, total + first * _SUM)
    except OSError as error:
        if error.errno == errno.EIO:  # a broken sector, or a file system that keeps checksums itself
            return None
        raise
    view = memoryview(data)
    found = array("I", (crc32(view[place : place + BLOCK]) for place in range(0, len(data), BLOCK)))
    if _little_endian(found).tobytes() != packed:
        return None
    return data[offset - start : offset - start + size]


def _little_endian(sums: "array[int]") -> "array[int]":
    if byteorder == "big":
        sums.byteswap()
    return sums
