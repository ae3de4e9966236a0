"""Members of a shard that are no plain files, such as links: no sample that needs one is lost without a word."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.data.shards.index_report import REJECTED
from cosmos_scale.data.shards.scan import scan_shard
from cosmos_scale.testing.shard_files import picture
from tests.data.shards.test_reader import JSON, keys

LINKS = {tarfile.LNKTYPE: "a link to a.{}", tarfile.SYMTYPE: "a link to a.{}", tarfile.FIFOTYPE: "a device or pipe"}


def add(tar: tarfile.TarFile, name: str, data: bytes, kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    tar.addfile(info, io.BytesIO(data))


def write_links(path: Path, kind: bytes, extensions: tuple[str, ...], tar_format: int = tarfile.GNU_FORMAT) -> Path:
    """Samples a, b and c; the members of b with some extensions are no files."""
    members = {"jpg": picture(0), "json": JSON}
    with tarfile.open(path, "w", format=tar_format) as tar:
        for key in "abc":
            for extension, data in members.items():
                if key == "b" and extension in extensions:
                    add(tar, f"b.{extension}", b"", kind, f"a.{extension}")
                else:
                    add(tar, f"{key}.{extension}", data)
    return path


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("extensions", [("jpg", "json"), ("jpg",), ("json",)])
def test_a_sample_that_needs_a_link_is_rejected_and_named(
    tmp_path: Path, kind: bytes, extensions: tuple[str, ...]
) -> None:
    reason = f"not a file: its .{extensions[0]} is {LINKS[kind].format(extensions[0])}"
    scan = scan_shard(write_links(tmp_path / "0.tar", kind, extensions))
    assert (keys(scan), scan.torn) == (["a", "c"], None)
    assert [fault[:2] for fault in scan.rejected] == [("b", reason)]
    report = index_shards(str(tmp_path), None, workers=1, progress=False)
    assert (report.samples, dict(report.rejected)) == (2, {"not a file": 1})
    line = json.loads((tmp_path / REJECTED).read_text())
    assert line == {"shard": "0.tar", "key": "b", "reason": reason}


def test_a_file_beside_a_link_is_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "a.jpg", picture(0))
        for name in ("b.jpg", "b.json"):
            add(tar, name, b"", tarfile.LNKTYPE, "a.jpg")
        add(tar, "b.png", picture(1, "PNG"))
        add(tar, "b.txt", b"a cat")
    scan = scan_shard(tmp_path / "0.tar")
    assert [(entry.key, entry.text_kind) for entry in scan.entries] == [("b", "txt")]
    assert [fault.reason for fault in scan.unread] == ["second picture: .png is read, not .jpg"]


def test_a_file_that_was_named_twice_to_tar_is_one_member(tmp_path: Path) -> None:
    """tar writes it the second time as a hard link to itself."""
    path = write_links(tmp_path / "0.tar", tarfile.REGTYPE, ())
    with tarfile.open(path, "a") as tar:
        add(tar, "a.jpg", b"", tarfile.LNKTYPE, "a.jpg")
    scan = scan_shard(path)
    assert (keys(scan), scan.rejected) == (["a", "b", "c"], [])


def test_sparse_members_are_named(tmp_path: Path) -> None:
    """The header of an old GNU sparse file (its own manual, "Old GNU Format"): one piece of data, then a hole."""
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in (("a.jpg", picture(0)), ("a.json", JSON), ("b.jpg", picture(1)), ("b.json", JSON)):
            add(tar, name, data)
    blocks = bytearray((tmp_path / "0.tar").read_bytes())
    start = blocks.index(b"b.jpg\0")
    size = len(picture(1))
    blocks[start + 156 : start + 157] = tarfile.GNUTYPE_SPARSE
    for place, number in ((386, 0), (398, size), (483, size + 4096)):
        blocks[start + place : start + place + 12] = f"{number:011o}\0".encode()
    blocks[start + 148 : start + 156] = b" " * 8
    blocks[start + 148 : start + 156] = f"{sum(blocks[start : start + 512]):06o}\0 ".encode()
    (tmp_path / "0.tar").write_bytes(blocks)
    scan = scan_shard(tmp_path / "0.tar")
    assert (keys(scan), scan.torn) == (["a"], None)
    assert [fault[:2] for fault in scan.rejected] == [
        ("b", "not a file: its .jpg is a sparse file, whose data do not lie in one piece")
    ]
