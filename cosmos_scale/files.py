"""Files that are written whole or not at all, folders, and waiting for the disk."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cosmos_scale.errors import UserError


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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError which says that the file cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def make_folder(folder: Path) -> None:
    """Make a folder for output; raises UserError where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made: {error.strerror or error}; name another folder with --out"
        ) from error


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's entries; raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
