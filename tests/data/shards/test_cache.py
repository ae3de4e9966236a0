"""The cache of whole shards: one download, a limit that holds, no half shard taken for whole, several processes."""

import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.config import RemoteConfig, SourceConfig
from cosmos_scale.data.shards.block_sums import BLOCK, BlockSums, read_checked, sums_size
from cosmos_scale.data.shards.cache import PART, WHOLE, ShardCache
from cosmos_scale.data.shards.index import index_shards, open_index
from cosmos_scale.data.shards.reader import ShardReader
from cosmos_scale.data.shards.store import Transient, WrongSize
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import picture, write_shard

SIZE = 10_240
FILE = SIZE + sums_size(SIZE)  # of a shard in the cache
FORK = multiprocessing.get_context("fork")


def content(name: str) -> bytes:
    return (hashlib.sha256(name.encode()).digest() * (SIZE // 32 + 1))[:SIZE]


def pieces(name: str, log: Path, wait: float = 0.0, fail: bool = False) -> Callable[[], Generator[bytes, None, None]]:
    """A download in four pieces that first writes its name to the log; `fail`: it fails after two pieces."""

    def download() -> Generator[bytes, None, None]:
        with log.open("a") as file:
            file.write(f"{name}\n")
        data = content(name)
        for start in range(0, SIZE, SIZE // 4):
            if fail and start == SIZE // 2:
                raise Transient("cut off")
            yield data[start : start + SIZE // 4]
            time.sleep(wait)

    return download


def files(folder: Path, ending: str) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith(ending))


def used(folder: Path) -> int:
    """Bytes in a cache at one moment, under its lock: only under the lock room is taken and files are renamed."""
    with (folder / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in [*files(folder, PART), *files(folder, WHOLE)] if path.exists())


def test_a_shard_is_downloaded_once_and_read_in_parts(tmp_path: Path) -> None:
    cache, log = ShardCache(tmp_path / "cache", 10 * SIZE), tmp_path / "log"
    for name in ("a", "b", "a"):
        for offset, size in ((0, SIZE), (5, 100), (SIZE - 3, 3), (SIZE - 3, 9)):
            data = cache.read(f"http://h/{name}.tar", SIZE, offset, size, pieces(name, log))
            assert data == content(name)[offset : offset + size]
    assert log.read_text() == "a\nb\n"
    assert [path.name[:2] for path in files(tmp_path / "cache", WHOLE)] == ["a-", "b-"]
    cache.read("http://h/x/a.tar", SIZE, 0, 1, pieces("other a", log))  # another address, another file
    assert log.read_text() == "a\nb\nother a\n"


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    cache = ShardCache(tmp_path / "cache", FILE)
    with pytest.raises(UserError, match=r"cache: Function not implemented: its file system has no locks; rule: choose"):
        cache.read("http://h/a.tar", SIZE, 0, 1, pieces("a", tmp_path / "log"))


def test_the_least_recently_used_shards_go_first(tmp_path: Path) -> None:
    cache, log = ShardCache(tmp_path / "cache", 3 * FILE + 10), tmp_path / "log"

    def read(names: str) -> None:
        for name in names:
            assert cache.read(f"pipe:cat {name}.tar", SIZE, 0, SIZE, pieces(name, log)) == content(name)
            time.sleep(0.02)  # file times may be so coarse

    read("abcacd")  # b was used longest ago
    assert [path.name[0] for path in files(tmp_path / "cache", WHOLE)] == ["a", "c", "d"]
    (tmp_path / "cache" / "notes.txt").write_bytes(bytes(5 * SIZE))  # a foreign file: neither counted nor deleted
    read("b")
    assert [path.name[0] for path in files(tmp_path / "cache", WHOLE)] == ["b", "c", "d"]
    assert (tmp_path / "cache" / "notes.txt").exists()
    assert log.read_text().split() == list("abcdb")


def test_a_shard_above_the_limit_is_refused(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, FILE - 1)
    with pytest.raises(UserError, match=r"^data\.remote\.cache_gb: 1\.0243e-05 is less than one shard, which takes"):
        cache.read("a.tar", SIZE, 0, 1, pieces("a", tmp_path / "log"))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"^data\.remote\.cache: .*file/cache: Not a directory"):
        ShardCache(tmp_path / "file" / "cache", SIZE).read("a.tar", SIZE, 0, 1, pieces("a", tmp_path / "log"))


def test_a_download_of_another_size_leaves_nothing(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 10 * SIZE)
    for size, found, final in ((SIZE + 1, str(SIZE), False), (SIZE - 1, f"more than {SIZE - 1}", True)):
        with pytest.raises(WrongSize) as wrong:
            cache.read("a.tar", size, 0, 1, pieces("a", tmp_path / "log"))
        assert (wrong.value.found, wrong.value.final) == (found, final)
    assert files(tmp_path / "cache", WHOLE) == files(tmp_path / "cache", PART) == []


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, place)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 0x10]), place)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, SIZE // 2),
    "a bit": lambda path: flip(path, SIZE - 1),
    "a bit of the checksums": lambda path: flip(path, SIZE + 1),
    "all zeros": lambda path: path.write_bytes(bytes(FILE)),
    "longer": lambda path: os.truncate(path, 2 * FILE),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_copy_that_the_disk_has_damaged_is_downloaded_again(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, log = ShardCache(tmp_path / "cache", 10 * SIZE), tmp_path / "log"
    cache.read("a.tar", SIZE, 0, 1, pieces("a", log))
    (copy,) = files(tmp_path / "cache", WHOLE)
    DAMAGE[damage](copy)
    for offset in (SIZE - 100, 0):
        assert cache.read("a.tar", SIZE, offset, SIZE, pieces("a", log)) == content("a")[offset:]
    assert log.read_text() == "a\na\n"
    assert capsys.readouterr().err == f"data.remote.cache: {copy}: is damaged on the disk; fetched again\n"


def test_a_copy_with_a_broken_sector_is_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, log, broken = ShardCache(tmp_path / "cache", 10 * SIZE), tmp_path / "log", [1]
    cache.read("a.tar", SIZE, 0, 1, pieces("a", log))
    read = os.pread

    def fail_once(descriptor: int, size: int, offset: int) -> bytes:
        if broken:
            broken.pop()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", fail_once)
    assert cache.read("a.tar", SIZE, 0, SIZE, pieces("a", log)) == content("a")
    assert log.read_text() == "a\na\n"


def test_a_disk_that_does_not_hold_what_is_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the shard would be downloaded for ever."""
    log = tmp_path / "log"
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: os.pwrite(descriptor, b"damage", 7))
    with pytest.raises(
        UserError, match=r"^data\.remote\.cache: .*/cache: a-.* was downloaded twice, .*; rule: a folder"
    ):
        ShardCache(tmp_path / "cache", 10 * SIZE).read("a.tar", SIZE, 0, SIZE, pieces("a", log))
    assert log.read_text() == "a\na\n"


@pytest.mark.parametrize("folder_too", [False, True])
@pytest.mark.parametrize("another", [False, True])
def test_a_cache_that_is_emptied_during_a_download_ends_no_run(tmp_path: Path, folder_too: bool, another: bool) -> None:
    """another: a process has begun to download the same shard anew; its part is not taken for this one's."""
    folder, log = tmp_path / "cache", tmp_path / "log"
    cache, parts = ShardCache(folder, 10 * SIZE), []

    def download() -> Generator[bytes, None, None]:
        yield content("a")[:100]
        parts.extend(files(folder, PART))
        shutil.rmtree(folder)
        if another or not folder_too:
            folder.mkdir()
        if another:
            parts[0].write_bytes(bytes(FILE))
        yield content("a")[100:]

    assert cache.read("a.tar", SIZE, 0, SIZE, download) == content("a")
    assert [path.read_bytes() for path in files(folder, PART)] == [bytes(FILE)] * another
    assert files(folder, WHOLE) == []
    assert cache.read("a.tar", SIZE, 0, SIZE, pieces("a", log)) == content("a")
    assert len(files(folder, WHOLE)) == 1


def test_a_failed_download_into_an_emptied_cache_leaves_anothers_part(tmp_path: Path) -> None:
    folder, parts = tmp_path / "cache", []

    def download() -> Generator[bytes, None, None]:
        yield content("a")[:100]
        parts.extend(files(folder, PART))
        parts[0].unlink()
        parts[0].write_bytes(bytes(FILE))
        raise Transient("cut off")

    with pytest.raises(Transient, match="cut off"):
        ShardCache(folder, 10 * SIZE).read("a.tar", SIZE, 0, SIZE, download)
    assert parts[0].read_bytes() == bytes(FILE)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_smaller_than_the_limit_makes_room_by_the_least_recently_used_shard(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Half of a node's disk may be taken by others, and cache_gb names the whole."""
    folder, log = tmp_path / "cache", tmp_path / "log"
    cache = ShardCache(folder, 100 * SIZE)

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if len(files(folder, WHOLE)) + len(files(folder, PART)) > 2:
                raise OSError(number, os.strerror(number))
            return super().write(data)

    monkeypatch.setattr(os, "fdopen", lambda descriptor, mode, buffering: Full(descriptor, mode))
    for name in "abcab":
        assert cache.read(f"{name}.tar", SIZE, 0, SIZE, pieces(name, log)) == content(name)
        time.sleep(0.01)
    assert log.read_text() == "a\nb\nc\na\nb\n"
    assert len(files(folder, WHOLE)) == 2
    assert capfd.readouterr().err.count("its disk is full, below data.remote.cache_gb") == 1


def test_a_disk_that_others_have_filled_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdopen", lambda descriptor, mode, buffering: Full(descriptor, mode))
    with pytest.raises(UserError, match=r"^data\.remote\.cache: .*/cache: No space left on device$"):
        ShardCache(tmp_path / "cache", 10 * SIZE).read("a.tar", SIZE, 0, SIZE, pieces("a", tmp_path / "log"))


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 100])
def test_each_block_is_checked_by_the_reads_that_touch_it(tmp_path: Path, size: int) -> None:
    data = (content("x") * (size // SIZE + 1))[:size]
    sums = BlockSums()
    for first in range(0, size, 10_000):  # pieces that end within blocks
        sums.add(data[first : first + 10_000])
    packed = sums.packed()
    assert len(packed) == sums_size(size)
    places = sorted({0, size // 2, size - 1, *range(BLOCK - 1, size, BLOCK), *range(BLOCK, size, BLOCK)})
    for damaged in (None, *places):
        path = tmp_path / "shard"
        path.write_bytes(data + packed)
        if damaged is not None:
            flip(path, damaged)
        with path.open("rb") as file:
            for first in places:
                for end in (first + 1, *(place for place in places if place > first), size + 9):
                    blocks = range(first // BLOCK, (min(end, size) - 1) // BLOCK + 1)
                    found = read_checked(file.fileno(), size, first, end - first)
                    sound = damaged is None or damaged // BLOCK not in blocks
                    assert found == (data[first:end] if sound else None)


def read_all(folder: Path, limit: int, names: str, wait: float) -> None:
    """What each of several processes does; a wrong byte ends the process with an exit code other than 0."""
    cache = ShardCache(folder / "cache", limit)
    for name in names:
        data = cache.read(f"{name}.tar", SIZE, 7, 5000, pieces(name, folder / "log", wait))
        assert data == content(name)[7:5007]


@pytest.mark.timeout(60)
def test_processes_that_want_a_shard_at_once_download_it_once(tmp_path: Path) -> None:
    processes = [FORK.Process(target=read_all, args=(tmp_path, 10 * SIZE, "ab", 0.1)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted((tmp_path / "log").read_text().split()) == ["a", "b"]


@pytest.mark.timeout(60)
def test_the_limit_holds_while_processes_download_and_evict(tmp_path: Path) -> None:
    """Four processes, six shards, room for two and a half: all bytes are right, and the limit always holds."""
    limit = 5 * SIZE // 2
    (tmp_path / "cache").mkdir()
    orders = ["abcdef", "fedcba", "cdefab", "badcfe"]
    processes = [FORK.Process(target=read_all, args=(tmp_path, limit, order * 5, 0.001)) for order in orders]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        most = max(most, used(tmp_path / "cache"))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert SIZE < most <= limit
    assert files(tmp_path / "cache", PART) == []


@pytest.mark.timeout(60)
def test_a_killed_download_is_never_taken_for_whole(tmp_path: Path) -> None:
    cache, log = ShardCache(tmp_path / "cache", 5 * SIZE // 2), tmp_path / "log"
    for again in ("a", "b"):  # first a reader of the same shard meets the dead part, then a reader that needs its room
        killed = FORK.Process(target=read_all, args=(tmp_path, 5 * SIZE // 2, "a", 100.0))
        killed.start()
        part = tmp_path / "cache"
        while not (part.exists() and any(os.path.getsize(path) == FILE for path in files(part, PART))):
            time.sleep(0.01)
        killed.kill()
        killed.join()
        assert len(files(tmp_path / "cache", PART)) == 1
        for name in (again, "c", "d"):
            assert cache.read(f"{name}.tar", SIZE, 0, SIZE, pieces(name, log)) == content(name)
        assert files(tmp_path / "cache", PART) == []
        assert len(files(tmp_path / "cache", WHOLE)) == 2


def fail_to_read(folder: Path) -> None:
    with pytest.raises(Transient, match="cut off"):
        ShardCache(folder / "cache", 10 * SIZE).read("a.tar", SIZE, 0, 1, pieces("a", folder / "log", 0.3, fail=True))


@pytest.mark.timeout(60)
def test_who_waits_for_a_download_hears_that_it_failed(tmp_path: Path) -> None:
    """Otherwise many workers would try a dead server one after the other, each with all its time-outs."""
    log = tmp_path / "log"
    first = FORK.Process(target=fail_to_read, args=(tmp_path,))
    first.start()
    while not log.exists():
        time.sleep(0.01)
    cache = ShardCache(tmp_path / "cache", 10 * SIZE)
    with pytest.raises(Transient, match="another process failed to download it"):
        cache.read("a.tar", SIZE, 0, 1, pieces("a", log))
    first.join()
    assert first.exitcode == 0
    assert log.read_text() == "a\n"
    assert cache.read("a.tar", SIZE, 0, SIZE, pieces("a", log)) == content("a")


def read_captions(folder: Path, captions: list[str], picture_number: int = 0) -> list[str]:
    """Write a shard anew, index it, and return the captions that come through the cache."""
    samples = [
        {
            "__key__": f"{number:06d}",
            "jpg": picture(picture_number + number, size=(80, 64)),
            "json": json.dumps({"caption": caption}).encode(),
        }
        for number, caption in enumerate(captions)
    ]
    size = write_shard(folder / "a.tar", samples).stat().st_size
    address = f"pipe:cat {folder}/a.tar"
    shutil.rmtree(folder / "index", ignore_errors=True)
    index_shards(address, folder / "index", workers=1, progress=False)
    source = open_index(SourceConfig(name="test", shards=address, index=str(folder / "index")))
    reader = ShardReader(RemoteConfig(cache=folder / "cache", backoff_s=0))
    read = [reader.read(source.locate(0, place)) for place in range(len(captions))]
    assert [data for data, _ in read] == [members["jpg"] for members in samples]
    assert source.rows[0].size == size == 20_480
    return [document["caption"] for _, document in read]


def test_a_shard_that_was_written_and_indexed_anew_is_fetched_anew(tmp_path: Path) -> None:
    """Also where its size is the same, as tars fill up to 10 kB, and where it begins with the same bytes."""
    for captions, picture_number in ((["one", "two"], 0), (["one", "other"], 0), (["one", "other"], 5)):
        assert read_captions(tmp_path, captions, picture_number) == captions
    assert len(files(tmp_path / "cache", WHOLE)) == 3
    read_captions(tmp_path, ["one", "other"], 5)
    assert len(files(tmp_path / "cache", WHOLE)) == 3
