"""What a file is by its first bytes, for messages on a file of another kind than its name or its place says."""

import re
import tarfile
from pathlib import Path

from cosmos_scale.errors import UserError
from cosmos_scale.files import regular_only, text_lines

# A name or a text may begin with letters alone: BZh, PAR1. So more than letters tells these kinds.
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    **{b"BZh%d%b" % (level, block): "bzip2" for level in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P\x90")},
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}

POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has not fetched

_UNPACK = {"gzip": "gzip -dc", "bzip2": "bzip2 -dc", "xz": "xz -dc", "zstd": "zstd -dc", "zip": "unzip -p"}
_TO_LINES = "write it as JSON lines, as pandas' to_json(..., orient='records', lines=True) does"
_TO_CSV = "save it as CSV UTF-8"
# The beginning of files that are taken for a text by their names: what each is, and how to come to a text.
_NO_TEXT = {
    b"PAR1\x15": ("a parquet file", _TO_LINES),
    b"ARROW1\0": ("an Arrow file", _TO_LINES),
    b"\xd0\xcf\x11\xe0": ("an Excel workbook", _TO_CSV),
    b"SQLite format 3\0": ("an SQLite database", "write the table as CSV"),
    b"\x89HDF": ("an HDF5 file", "write its texts as JSON lines"),
    b"%PDF-": ("a PDF", "name the text that it was made of"),
    b"\xff\xd8\xff": ("a JPEG picture", "name the file of texts"),
    b"\x89PNG": ("a PNG picture", "name the file of texts"),
    POINTER: ("a pointer of Git LFS", "fetch the file itself (git lfs pull)"),
}
# More files that lie among shards and are none.
_NO_SHARD = {
    **{magic: what for magic, (what, _) in _NO_TEXT.items()},
    b"\x93NUMPY": "a NumPy array (as of an index)",
}
_SHARD_LINE = re.compile(r"\S*\.tar\b")
_IN_WORKBOOKS = (b"[Content_Types].xml", b"_rels/", b"docProps/")  # first members of the zip that a workbook is
HEAD = tarfile.BLOCKSIZE  # bytes that tell a file's kind


def compression_of(head: bytes) -> str:
    """Return how a file is compressed, by its first bytes (ten or more); empty where it is not."""
    return next((kind for magic, kind in COMPRESSED.items() if head.startswith(magic)), "")


def no_text(path: Path) -> str:
    """Return what a file is instead of a text, by its first bytes, and the way to a text; empty where it may be a text.

    A UTF-16 or UTF-32 text is none here. Other bytes that are not UTF-8 are left to the reader of the text. Raises:
    OSError where the file cannot be read.
    """
    with open(path, "rb", opener=regular_only) as file:
        head = file.read(HEAD)
    kind = compression_of(head)
    if kind == "zip" and any(member in head[:128] for member in _IN_WORKBOOKS):
        found = ("an Excel workbook", _TO_CSV)
    elif kind:
        found = ("a zip archive" if kind == "zip" else f"{kind}-compressed", f"unpack it ({_UNPACK[kind]})")
    elif is_tar(head) and head.strip(b"\0"):
        found = ("a tar", "unpack it (tar -xf)")
    else:
        found = next((said for magic, said in _NO_TEXT.items() if head.startswith(magic)), ("", ""))
    if found[0]:
        return f"is {found[0]} by its first bytes; rule: {found[1]}"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
        return "is UTF-16 or no text; save it as UTF-8"
    return ""


def refuse_no_text(path: Path) -> None:
    """Raise UserError where a file of text is something else by its first bytes, and OSError as `no_text`."""
    if said := no_text(path):
        raise UserError(f"{path}: {said}")


def is_tar(head: bytes) -> bool:
    """Return whether a file begins as a tar, by its first bytes (HEAD or more): with a member, or at its end."""
    try:
        tarfile.TarInfo.frombuf(head[:HEAD], "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return True
    except tarfile.HeaderError:
        return False
    return True


def no_shard(path: Path) -> str:
    """Return what a file is that is no shard, by its first bytes, and the way to shards; empty where it may be one.

    A compressed tar and a pointer of Git LFS are left to the reader of shards.
    Raises: OSError where the file cannot be read.
    """
    with open(path, "rb", opener=regular_only) as file:
        head = file.read(1 << 12)
    if is_tar(head) or compression_of(head) or head.startswith(POINTER):
        return ""
    rule = "rule: name the folder of the shards, or .tar files, as in 'FOLDER/{00000..00331}.tar' or '{a,b}.tar'"
    build = f"{rule}; `cosmos-scale data build` makes shards of pictures and a file of captions"
    if not head:
        return f"is empty, no shard; {rule}"
    for magic, what in _NO_SHARD.items():
        if head.startswith(magic):
            return f"is {what} by its first bytes, no shard; {build}"
    text = head.decode("utf-8-sig", "ignore")
    if "\0" in text:
        return f"is no tar by its first bytes; {rule}"
    lines = [line for line in text_lines(text) if line.strip()]
    if text.lstrip().startswith(("{", "[")):
        kind = "the index of shards" if path.name == "index.json" else "a JSON text"
        return f"is {kind}, no shard; {rule if path.name == 'index.json' else build}"
    if lines and _SHARD_LINE.match(lines[0]):
        return f"is a text that lists shards, no shard; {rule}"
    return f"is a text, no shard; {build}"
