"""Files that are written whole or not at all, folders, and waiting for the disk."""

import errno
import functools
import json
import os
import re
import resource
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from cosmos_scale.errors import UserError

# What a file system says that lacks locks, or the fsync of folders.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP}

# What the system says where a file has no room: on the disk, in the user's quota, or under the limit of `ulimit -f`.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# What ends any work and is no fault of the program: too few open files allowed, no memory, and no room for a file.
_OF_THE_MACHINE = (errno.EMFILE, errno.ENOMEM, *NO_ROOM)
# What the system says of a path that may not be looked at, cannot be one, or lies on a disk that does not answer.
_OF_A_PATH = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT),
)

# What libraries say in errors of their own, which keep no errno, where memory has run out or no thread can be started.
_NO_MEMORY = (
    *(os.strerror(errno.ENOMEM), "can't allocate memory", "not enough memory", "std::bad_alloc"),
    *("failed to map segment", "unable to mmap"),
)
_NO_THREAD = ("can't start new thread", "pthread_create", os.strerror(errno.EAGAIN))
_MORE_PROCESSES = "allow more (ulimit -u), or more memory (ulimit -v)"

_COMPILERS_FOLDERS = "torch's compiler (TORCHINDUCTOR_CACHE_DIR, TMPDIR)"

TOO_MANY_OPEN_FILES = os.strerror(errno.EMFILE)

_BEGIN = 1 << 16  # bytes of a file in which its sign is looked for

_IRREGULAR = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def regular_only(path: str, flags: int) -> int:
    """The opener, for `open`, of every file that a user or a folder names: it opens regular files only.

    To open a FIFO waits for a process at its other end, and a device such as /dev/zero never ends. Raises: OSError,
    with the kind of the file as its reason.
    """
    try:
        # Without O_NONBLOCK to open a FIFO would wait already. For a regular file the flag changes nothing.
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a FIFO that nobody reads, opened to be written
            raise _irregular(path, os.stat(path).st_mode) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _irregular(path, mode)
    return descriptor


def _irregular(path: str, mode: int) -> OSError:
    kind = _IRREGULAR.get(stat.S_IFMT(mode), "of another kind")
    number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    return OSError(number, f"it is {kind}, not a regular file", path)


def kind_of_file(path: Path) -> str:
    """Return what lies at a path that is no regular file, such as "a folder"; empty where nothing can be seen there."""
    with suppress(OSError):
        return _IRREGULAR.get(stat.S_IFMT(path.stat().st_mode), "of another kind")
    return ""


def read_regular(path: str | Path) -> bytes:
    """Return the bytes of a regular file; raises OSError, also where the path is a folder, a FIFO or a device."""
    with open(path, "rb", opener=regular_only) as file:
        return file.read()


def text_lines(text: str) -> list[str]:
    r"""Return the lines of a user's text, which end at \n, \r\n or \r.

    str.splitlines also cuts at form feeds, U+0085, U+2028 and others, which may stand in a name.
    """
    lines = re.split(r"\r\n|\n|\r", text)
    return lines if lines[-1] else lines[:-1]


def load_json(data: str | bytes | bytearray) -> Any:
    """Return what a JSON text holds; raises ValueError where it is not valid, or nested too deep to be read."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; the block's end renames the file there to `path`.

    Where the block raises, the temporary file is deleted and `path` stays as it was. The same where the block deletes
    the temporary file itself. Processes that write the same file at the same time do not disturb each other.
    Raises: OSError where the rename fails.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        if part.exists():
            part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; raises UserError where it cannot be written."""
    with writing(path), whole_file(path) as part:
        part.write_bytes(data)


def keep_foreign(path: Path, sign: bytes, what: str) -> None:
    """Raise UserError where a file is there that lacks a sign near its begin: it is not ours, and would be lost.

    sign: bytes that every file has which a command writes there. what: such a file, for people. Files without a byte
    and what is no regular file, such as /dev/stdout, pass.
    """
    with writing(path):
        if not path.is_file():
            return
        with open(path, "rb", opener=regular_only) as file:
            begin = file.read(_BEGIN)
    if begin and sign not in begin:
        raise UserError(f"{path}: is there, and is no {what}; rule: move it away, or name another file")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError which says that the file cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {reason_of(error)}") from error


@contextmanager
def temporary_copy() -> Iterator[BinaryIO]:
    """Yield a temporary file for a whole shard; raises UserError where no folder takes it, or has room for it."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(f"{error.strerror}; rule: TMPDIR names a folder that can be written to") from error
    try:
        with tempfile.NamedTemporaryFile() as file:
            yield cast(BinaryIO, file)
    except OSError as error:
        if error.errno not in NO_ROOM or error.filename is not None:
            raise
        raise UserError(
            f"{folder}: temporary files cannot be written: {reason_of(error)}; rule: TMPDIR names a "
            "folder with room for a whole shard"
        ) from error


def make_folder(folder: Path) -> None:
    """Make a folder for output; raises UserError where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {reason_of(error)}; name another folder with --out") from error


def delete_folder(folder: Path) -> None:
    """Delete a folder with all that it holds, or a link to one, whose target stays; what cannot be deleted stays."""
    if folder.is_symlink():
        with suppress(OSError):
            folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def make_output_folder(folder: Path) -> None:
    """Make a command's folder for output, before its work; raises UserError where no file can be made there."""
    make_folder(folder)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written to: {reason_of(error)}; name another folder with --out"
        ) from error


def make_own_folder(folder: Path, mark: str) -> None:
    """Make and mark a folder that a program fills anew each time, and may empty.

    Raises: UserError where it holds files and no mark: they are somebody else's.
    """
    make_output_folder(folder)
    if not (folder / mark).is_file() and any(folder.iterdir()):
        rule = "rule: a folder that is new, empty, or of an earlier run of this program"
        raise UserError(f"--out: {folder} holds other files, which could be replaced or deleted; {rule}")
    with writing(folder / mark):
        (folder / mark).touch()


def whole_path(path: str | Path) -> str:
    """Return a path for messages, from the root on: in a log nobody knows what a relative path starts from.

    A URL in the place of a path stays as it is.
    """
    return str(path) if re.match(r"\w{2,}:/", str(path)) else os.path.abspath(path)


def name_on_disk(name: str) -> str:
    """Return a name such that its UTF-8 bytes are looked for on the disk, whatever the locale's encoding.

    Python would look for the locale's bytes: in ISO-8859-1 for others, and in ASCII for none.
    """
    with suppress(UnicodeEncodeError):  # half of a surrogate pair: such a name has no bytes
        return os.fsdecode(name.encode("utf-8", "surrogateescape"))
    return name


def reason_of(error: OSError) -> str:
    """Return why the system refused a file, with the way on where too few open files are allowed."""
    said = error.strerror or str(error)
    if error.errno == errno.EMFILE:
        return f"{said}; allow more (ulimit -n)"
    if error.errno == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        return f"{said}; allow more (ulimit -f)" if limit != resource.RLIM_INFINITY else said
    if error.errno == errno.ENOMEM:
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        return f"{said}; {limit:,} bytes are allowed (ulimit -v)" if limit != resource.RLIM_INFINITY else said
    return said


def cause_in_the_machine(error: BaseException) -> OSError | None:
    """Return the OSError of the machine or of a named path that an error is, or comes from; None: of another cause."""
    if isinstance(error, OSError) and (
        error.errno in _OF_THE_MACHINE or (error.errno in _OF_A_PATH and error.filename is not None)
    ):
        return error
    text = str(error)
    if isinstance(error, RuntimeError) and TOO_MANY_OPEN_FILES in text:  # of libraries, which keep no errno
        return OSError(errno.EMFILE, TOO_MANY_OPEN_FILES)
    full = next((number for number in NO_ROOM if os.strerror(number) in text), None)
    if isinstance(error, RuntimeError) and full is not None:
        place = _COMPILERS_FOLDERS if type(error).__module__.startswith("torch._inductor") else None
        return OSError(full, os.strerror(full), place)
    if isinstance(error, RuntimeError) and any(said in text for said in _NO_THREAD):
        return OSError(errno.EAGAIN, f"no thread can be started; {_MORE_PROCESSES}")
    if isinstance(error, BlockingIOError) and error.strerror == os.strerror(errno.EAGAIN):  # of a fork
        return OSError(errno.EAGAIN, f"no process can be started; {_MORE_PROCESSES}")
    if isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, ImportError, OSError)) and any(said in text for said in _NO_MEMORY)
    ):
        return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    return cause_in_the_machine(error.__cause__) if error.__cause__ is not None else None


def no_locks(error: OSError) -> str:
    """Return why a file cannot be locked, and the way on; empty where the file system does have locks."""
    if error.errno not in _NO_LOCKS:
        return ""
    return (
        f"{error.strerror}: its file system has no locks; rule: choose a folder of another file system, "
        "or mount this one with locks (Lustre: -o flock)"
    )


def folder_descriptor(folder: Path) -> int:
    """Return a descriptor of a folder, to lock or sync it; raises OSError, as for anything that is no folder."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's entries; raises OSError.

    Some network file systems cannot sync folders. There the wait counts as done, after one warning in each process.
    """
    descriptor = folder_descriptor(folder)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
        _warn_of_folders(str(error.strerror))
    finally:
        os.close(descriptor)


@functools.cache
def _warn_of_folders(reason: str) -> None:
    said = "cannot sync folders: the newest checkpoint may be lost where the power fails"
    print(f"cosmos-scale: warning: the output's file system ({reason}) {said}", file=sys.stderr)
