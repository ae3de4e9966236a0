"""Links and folders inside shards of images: what they lead to is used, or the true reason is given."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from tests.data.prepare.downloads import download, dreamlip_row, metadata, url, write_dreamlip, write_folder, write_tar
from tests.data.prepare.test_pairing import pairs, rejects
from tests.data.prepare.test_prepare import run

ITEMS = [download(number) for number in range(4)]


@pytest.fixture(autouse=True)
def captions(tmp_path: Path) -> Path:
    (tmp_path / "captions").mkdir()
    return write_dreamlip(tmp_path / "captions" / "a.csv", [dreamlip_row(number) for number in range(4)])


def write_linked_tar(path: Path, links: list[tuple[str, str, bytes]], files: list[tuple[str, bytes]]) -> None:
    """A tar of some files, then of the json of each item and the links: (name, target, kind)."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, data in [*files, *((f"{item.key}.json", json.dumps(metadata(item)).encode()) for item in ITEMS)]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
            for link, target, kind in links:
                if link.startswith(name.removesuffix(".json") + ".jpg") and name.endswith(".json"):
                    member = tarfile.TarInfo(link)
                    member.type, member.linkname = kind, target
                    shard.addfile(member)


def test_links_in_a_tar_are_the_files_that_they_lead_to_or_say_why_not(tmp_path: Path) -> None:
    names = [f"{item.key}.jpg" for item in ITEMS]
    links = [
        (names[0], "store/a.bin", tarfile.LNKTYPE),
        (names[1], "./store/../store/b.bin", tarfile.SYMTYPE),
        (names[2], "/elsewhere/c.jpg", tarfile.SYMTYPE),
        (names[3], names[3], tarfile.SYMTYPE),  # to itself
    ]
    files = [("store/a.bin", ITEMS[0].data or b""), ("store/b.bin", ITEMS[1].data or b"")]
    write_linked_tar(tmp_path / "images" / "00000.tar", links, files)
    run(tmp_path)
    assert pairs(tmp_path / "out") == {item.key: (item.data, item.url) for item in ITEMS[:2]}
    assert rejects(tmp_path / "out") == [
        (ITEMS[2].key, 3, "not a file: its .jpg is a link to /elsewhere/c.jpg, which is no file of its tar"),
        (ITEMS[3].key, 4, f"not a file: its .jpg is a link to {names[3]}, which is no file of its tar"),
    ]


def test_a_hard_link_means_what_had_the_name_before_it(tmp_path: Path) -> None:
    path = tmp_path / "images" / "00000.tar"
    write_linked_tar(path, [(f"{ITEMS[0].key}.jpg", "a.bin", tarfile.LNKTYPE)], [("a.bin", ITEMS[0].data or b"")])
    with tarfile.open(path, "a") as shard:
        member = tarfile.TarInfo("a.bin")
        member.size = len(ITEMS[1].data or b"")
        shard.addfile(member, io.BytesIO(ITEMS[1].data or b""))
    run(tmp_path)
    assert pairs(tmp_path / "out") == {ITEMS[0].key: (ITEMS[0].data, url(0))}


def test_a_tar_that_names_a_file_twice_by_a_link_to_itself_holds_it_once(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "images", "00000", ITEMS)
    with tarfile.open(path, "a") as shard:
        member = tarfile.TarInfo(f"{ITEMS[3].key}.jpg")
        member.type, member.linkname = tarfile.LNKTYPE, member.name
        shard.addfile(member)
    run(tmp_path)
    assert len(pairs(tmp_path / "out")) == 4


@pytest.mark.parametrize("listing", [True, False], ids=["parquet", "json"])
def test_pictures_in_folders_of_a_folder_shard_are_read(tmp_path: Path, listing: bool) -> None:
    folder = write_folder(tmp_path / "images", "00000", ITEMS, listing=listing)
    (folder / "more" / "still").mkdir(parents=True)
    for ending in ("jpg", "json"):
        for number, place in ((1, "more"), (2, "more/still")):
            name = f"{ITEMS[number].key}.{ending}"
            (folder / name).rename(folder / place / name)
    (folder / "more" / "up").symlink_to(folder)
    (folder / f"._{ITEMS[0].key}.jpg").write_bytes(b"\0\5\x16\7")  # what macOS leaves beside a file
    run(tmp_path)
    assert pairs(tmp_path / "out") == {item.key: (item.data, item.url) for item in ITEMS}


@pytest.mark.parametrize("listing", [True, False], ids=["parquet", "json"])
def test_files_of_a_folder_without_bytes_say_why(tmp_path: Path, listing: bool) -> None:
    folder = write_folder(tmp_path / "images", "00000", ITEMS, listing=listing)
    paths = [folder / f"{item.key}.jpg" for item in ITEMS]
    paths[1].rename(folder / "store")
    paths[1].symlink_to("store")
    paths[2].unlink()
    paths[2].symlink_to("nowhere.jpg")
    paths[3].unlink()
    os.mkfifo(paths[3])
    run(tmp_path)
    assert set(pairs(tmp_path / "out")) == {ITEMS[0].key, ITEMS[1].key}
    assert [reason for _, _, reason in rejects(tmp_path / "out")] == [
        "not a file: its .jpg is a link to nowhere.jpg, which is no file",
        "not a file: its .jpg is a device or pipe",
    ]
