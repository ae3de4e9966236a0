"""The cache of whole shards in a folder that several users share: who may read, write and delete its files."""

import multiprocessing
import os
from collections.abc import Callable, Generator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from cosmos_scale.data.shards.block_sums import sums_size
from cosmos_scale.data.shards.cache import WHOLE, ShardCache
from cosmos_scale.errors import UserError

SIZE = 10_240
CONTENT = bytes(range(256)) * (SIZE // 256)
FILE = SIZE + sums_size(SIZE)  # of a shard in the cache
FORK = multiprocessing.get_context("fork")
GROUP = 65533  # of two users, whose numbers no system gives to others


def pieces(log: Path) -> Callable[[], Generator[bytes, None, None]]:
    """A download that adds a line to the log."""

    def download() -> Generator[bytes, None, None]:
        with log.open("a") as file:
            file.write("downloaded\n")
        yield CONTENT

    return download


@pytest.mark.parametrize(("folder_mode", "file_mode"), [(0o770, 0o660), (0o777, 0o666), (0o755, 0o600)])
def test_files_get_the_rights_of_a_folder_that_others_write_to(
    tmp_path: Path, folder_mode: int, file_mode: int
) -> None:
    cache = ShardCache(tmp_path / "cache", FILE)
    cache.folder.mkdir()
    cache.folder.chmod(folder_mode)
    before = os.umask(0o077)
    try:
        cache.read("a.tar", SIZE, 0, 1, pieces(tmp_path / "log"))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in cache.folder.iterdir()} == {file_mode}
    assert len(list(cache.folder.iterdir())) == 2  # the shard and the lock


def _as_user(user: int, work: Callable[[], None]) -> int:
    """Return the exit status of a process of another user in the group GROUP; 3 where the work raises UserError."""

    def run() -> None:
        os.setgroups([])
        os.setgid(GROUP)
        os.setuid(user)
        os.umask(0o022)
        try:
            work()
        except UserError as error:
            print(error)
            raise SystemExit(3) from None

    process = FORK.Process(target=run)
    process.start()
    process.join(30)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two other users")
@pytest.mark.parametrize("old_files", [False, True])
def test_two_users_of_a_group_share_a_cache(old_files: bool, capfd: pytest.CaptureFixture[str]) -> None:
    with TemporaryDirectory() as name:  # pytest's own folders let no other user in
        folder, logs = Path(name) / "cache", Path(name) / "logs"
        Path(name).chmod(0o755)
        for made in (folder, logs):
            made.mkdir()
            os.chown(made, 0, GROUP)
            made.chmod(0o2775)

        def read(names: str) -> Callable[[], None]:
            def work() -> None:
                for name in names:
                    log = logs / str(os.geteuid())
                    assert ShardCache(folder, FILE).read(name, SIZE, 0, SIZE, pieces(log)) == CONTENT

            return work

        assert _as_user(65533, read("a")) == 0
        if old_files:  # that the umask alone has made
            for path in folder.glob(f"*{WHOLE}"):
                path.chmod(0o644)
        assert _as_user(65534, read("ab")) == 0  # the limit has room for one shard
        assert _as_user(65533, read("b")) == 0
        assert [len(path.read_text().split()) for path in sorted(logs.iterdir())] == [1, 1]

        (folder / "lock").unlink()
        (folder / "lock").touch(0o600)
        assert _as_user(65534, read("a")) == 3
        place = f"data.remote.cache: {folder}: {folder / 'lock'}"
        assert (
            f"{place}: Permission denied; rule: a folder whose files this user may read and write"
            in capfd.readouterr().out
        )
