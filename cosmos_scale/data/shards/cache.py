"""A folder of whole remote shards, shared by all processes of a host and kept below a limit of bytes.

While a shard is downloaded, its file is called `.part`, has its full size at once (so that the limit counts it), and is
locked. Another process that wants the shard waits for the lock, so that no shard is downloaded twice. A part without a
lock was left by a process that died; it is never taken for a shard. Whole shards are not locked and not kept open
between reads. So the least recently used shard can be deleted at any time: a process that reads it at that moment still
has the open file. The same holds where users empty the folder while runs read through it.

Behind a shard's bytes its file holds their checksums, which each read compares. A copy that the local disk has damaged
is deleted and downloaded anew, so that it costs no sample.

A folder in which a group or all may write is shared by its users: the files get the folder's rights to read and write,
whatever the umask is. Else the shard of one user would end the run of another, who may neither lock nor delete it.
"""

import errno
import fcntl
import hashlib
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cosmos_scale.data.shards.block_sums import BlockSums, read_checked, sums_size
from cosmos_scale.data.shards.store import Transient, WrongSize
from cosmos_scale.errors import UserError
from cosmos_scale.files import no_locks, regular_only

WHOLE, PART = ".shard", ".part"  # only files with these endings are counted and deleted
_FORM = "with sums of 16 KiB"  # of the files, in their names
_FAILED = b"failed"  # what a part holds after its download failed, for the processes that wait for it
_WAIT = 0.05  # seconds between two looks for room, while other downloads hold it

_OF_OTHERS = 0o066  # the rights of a folder that its files share: to read and to write
_WRITTEN_BY_OTHERS = 0o022

Pieces = Callable[[], Generator[bytes, None, None]]


class ShardCache:
    """Reads shards through a folder; `limit` is the most bytes in it, downloads in flight included."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self._limit = limit
        self._told = False  # that the disk is smaller than the limit

    def read(self, version: str, total: int, offset: int, size: int, pieces: Pieces) -> bytes:
        """Read a part of a shard of `total` bytes. A shard that is not in the folder is downloaded before.

        version: a shard's address, and what tells its content from one that lay there before. pieces: yields the whole
        shard.
        Raises: UserError where the folder cannot be written or does not hold what is written, or where the shard is
        larger than the limit; Transient, WrongSize, and what `pieces` raises, where the download fails.
        """
        path = self.folder / _name(version, total)
        try:
            for _ in range(2):  # one more download where the copy is damaged; the disk that damages that one is broken
                file = self._open_whole(path, total)
                while file is None:
                    file = self._download(path, total, pieces) or self._open_whole(path, total)
                with file:
                    with suppress(PermissionError):  # another user's shard can be read all the same
                        os.utime(file.fileno())  # used just now
                    data = read_checked(file.fileno(), total, offset, size)
                    if data is not None:
                        return data
                    self._drop(file, path)
        except OSError as error:
            said = no_locks(error) or error.strerror or str(error)
            if isinstance(error, PermissionError):
                said = f"{error.filename or path}: {said}; rule: a folder whose files this user may read and write"
            raise UserError(f"data.remote.cache: {self.folder}: {said}") from error
        raise UserError(
            f"data.remote.cache: {self.folder}: {path.name} was downloaded twice, and reads otherwise than it was "
            "written; rule: a folder on a sound disk"
        )

    def _open_whole(self, path: Path, total: int) -> BinaryIO | None:
        """Open a shard's file; None where there is none, or where it is not whole, which deletes it."""
        try:
            file = open(path, "rb", buffering=0, opener=regular_only)  # noqa: SIM115 - stays open
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size == total + sums_size(total):
            return file
        with file:
            self._drop(file, path)
        return None

    def _drop(self, file: BinaryIO, path: Path) -> None:
        """Delete a damaged copy of a shard, unless another process has done so already."""
        with self._locked():
            if not _is(file, path):
                return
            path.unlink()
        print(f"data.remote.cache: {path}: is damaged on the disk; fetched again", file=sys.stderr)

    def _download(self, path: Path, total: int, pieces: Pieces) -> BinaryIO | None:
        """Return the shard's file, downloaded by this process or another; None where the caller must look again."""
        size = total + sums_size(total)
        if size > self._limit:
            raise UserError(
                f"data.remote.cache_gb: {self._limit / 1e9:g} is less than one shard, which takes {size / 1e9:g}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(PART)
        file = os.fdopen(regular_only(str(part), os.O_RDWR | os.O_CREAT), "r+b", buffering=0)
        try:
            self._share(file)
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is(file, part):
                return self._of_another(file, size)
            if path.exists():  # another process finished the shard after this one had looked for it
                part.unlink()
            else:
                self._fill(file, part, total, pieces)
                with self._locked():  # a rename could hide the file from a process that lists the folder meanwhile
                    # Somebody may have emptied the folder: then the name is gone, or is another process's part by now.
                    if _is(file, part):
                        part.rename(path)
                fcntl.flock(file, fcntl.LOCK_UN)
                return file
        except BaseException:
            file.close()
            raise
        file.close()
        return None

    def _of_another(self, file: BinaryIO, size: int) -> BinaryIO | None:
        """Return the shard's file from a part that another process had locked; None where that process gave it up."""
        found = os.fstat(file.fileno()).st_size
        if found == size:  # whole, even if its name is gone from the folder by now
            fcntl.flock(file, fcntl.LOCK_UN)
            return file
        file.close()
        if found:
            raise Transient("another process failed to download it")
        return None  # the part was cleared away

    def _fill(self, file: BinaryIO, part: Path, total: int, pieces: Pieces) -> None:
        """Download into the locked part; where the download fails, leave only a word for the processes that wait."""
        try:
            file.truncate(0)
            self._reserve(file, total + sums_size(total))
            came, sums = 0, BlockSums()
            with closing(pieces()) as stream:
                for piece in stream:
                    came += len(piece)
                    if came > total:
                        raise WrongSize(f"more than {total}", final=True)
                    sums.add(piece)
                    self._write(file, piece)
            if came != total:
                raise WrongSize(str(came), final=False)
            self._write(file, sums.packed())
            os.fdatasync(file.fileno())  # in a crash of the machine the name must not outlive the bytes
        except BaseException:
            file.truncate(0)
            os.pwrite(file.fileno(), _FAILED, 0)
            if _is(file, part):
                part.unlink(missing_ok=True)
            raise

    def _write(self, file: BinaryIO, data: bytes) -> None:
        """Write to a part; where the disk is full before the limit is reached, whole shards give their room."""
        view = memoryview(data)
        while view:
            try:
                view = view[file.write(view) :]
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._delete_oldest():
                    raise

    def _delete_oldest(self) -> bool:
        """Delete the shard that was used least recently, which is told once; False where there is none."""
        with self._locked():
            _, whole = self._contents()
            if not whole:
                return False
            min(whole)[1].unlink(missing_ok=True)
        if not self._told:
            self._told = True
            print(
                f"data.remote.cache: {self.folder}: its disk is full, below data.remote.cache_gb: "
                f"{self._limit / 1e9:g}; the least recently used shards go",
                file=sys.stderr,
            )
        return True

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Give the part its full size once there is room: delete whole shards, and wait for other downloads."""
        while True:
            with self._locked():
                used, whole = self._contents()
                for _, path, freed in sorted(whole):
                    if used + size <= self._limit:
                        break
                    path.unlink(missing_ok=True)
                    used -= freed
                if used + size <= self._limit:
                    file.truncate(size)
                    return
            time.sleep(_WAIT)

    def _contents(self) -> tuple[int, list[tuple[int, Path, int]]]:
        """Delete dead parts; return the bytes that remain, and the whole shards: (time of last use, path, bytes)."""
        used, whole = 0, []
        for entry in os.scandir(self.folder):
            try:
                if entry.name.endswith(PART) and _clear_dead(Path(entry.path)):
                    continue
                if entry.name.endswith((WHOLE, PART)):
                    status = entry.stat()
                    used += status.st_size
                    if entry.name.endswith(WHOLE):
                        whole.append((status.st_mtime_ns, Path(entry.path), status.st_size))
            except FileNotFoundError:
                continue
        return used, whole

    def _share(self, file: BinaryIO) -> None:
        """Give a file, if it is this user's, the rights of a folder in which others may write."""
        with suppress(OSError):  # the folder may be gone by now, and some file systems keep no rights
            folder, mode = self.folder.stat().st_mode, stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if folder & _WRITTEN_BY_OTHERS and folder & _OF_OTHERS & ~mode:
                os.fchmod(file.fileno(), mode | folder & _OF_OTHERS)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it, to have its room
        with open(self.folder / "lock", "wb", opener=regular_only) as lock:
            self._share(lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _name(version: str, total: int) -> str:
    """Name a shard's file by the end of its address and a digest of the whole: an address may hold secrets.

    Older caches hold the same shards without checksums, by other names; they are the first to be deleted.
    """
    digest = hashlib.sha256(f"{_FORM} {total} {version}".encode()).hexdigest()[:24]
    shown = re.findall(r"[\w-]+(?=\.tar)", version)
    return f"{shown[-1][-40:] if shown else 'shard'}-{digest}{WHOLE}"


def _is(file: BinaryIO, path: Path) -> bool:
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _clear_dead(part: Path) -> bool:
    """Delete a part that no process holds; False where a process holds it, or where it has become a shard."""
    with open(part, "r+b", buffering=0, opener=regular_only) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not _is(file, part):
            return False
        file.truncate(0)
        part.unlink()
        return True
