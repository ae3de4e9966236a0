"""The mark of a shard: digests of its first blocks, which tell another shard of the same name and size.

A mark costs one short read, of a server too. Damage at one place changes one digest or two, so that a shard with damage
keeps its mark, and its damaged samples are found one by one.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterable

HEAD = 4096  # bytes of a shard that its mark is made of
_DIGITS = 4  # of the digest of a block
_EMPTY = hashlib.sha256(bytes(tarfile.BLOCKSIZE)).hexdigest()[:_DIGITS]  # what follows the last member


def mark_of(head: bytes) -> str:
    """Return the mark of a shard by its first HEAD bytes, or by all bytes of a smaller shard."""
    blocks = [head[first : first + tarfile.BLOCKSIZE] for first in range(0, min(len(head), HEAD), tarfile.BLOCKSIZE)]
    return "".join(hashlib.sha256(block).hexdigest()[:_DIGITS] for block in blocks)


def marks_digest(marks: Iterable[str]) -> str:
    """Return a digest of many shards' marks, in order; empty where a shard has no mark."""
    known = list(marks)
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16] if all(known) else ""


def is_other(mark: str, head: bytes) -> bool:
    """Whether a shard's first bytes are a tar's, but not those of the shard that has a mark.

    head: any number of whole blocks. More than half of those that held something must differ: damage changes a few.
    """
    found = mark_of(head)
    blocks = (slice(first, first + _DIGITS) for first in range(0, len(found), _DIGITS))
    differ = [mark[block] != found[block] for block in blocks if mark[block] != _EMPTY]
    return 2 * sum(differ) > len(differ) and _is_header(head[: tarfile.BLOCKSIZE])


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
