"""The folder of an export: written whole or not at all, and replaced only as far as an export before wrote it.

Which files an export has written, and their sums, is told by the last lines of its README.md.
"""

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cosmos_scale.checkpoint.interchange.export_files import Advance, ExportedFile, ToldFile, text_file
from cosmos_scale.checkpoint.room import free_bytes
from cosmos_scale.errors import UserError
from cosmos_scale.files import folder_descriptor, read_regular, reason_of, regular_only, whole_path

CARD = "README.md"
# Exports of earlier versions have no sums.
_OWN = re.compile(
    r"(?:^<!-- their sums: (.+) -->\n)?^<!-- files of cosmos-scale convert: (.+) -->[ \t\r]*$", re.MULTILINE
)
_SUMMED = 1 << 20  # bytes at each end of a file: its whole would take seconds, and who writes a model anew changes both
_SPARE = 1 << 20  # bytes beside the tensors: tables of contents of files, folders
_LOCKED_AFTER = 60  # seconds after which, where there are no locks, no live export is between two steps
_LOCK_SECONDS = 30.0  # that an export waits for another one, which changes names in the same folder
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def check_target(folder: Path, names: Sequence[str], *, force: bool) -> None:
    """Raise UserError unless files of these names and a card may be written as a folder.

    Without `force` the folder must be absent or empty. With it the folder may also be one that an earlier export wrote:
    its files go, and files of others in it stay; but none of the new files may have the name of another's file, and its
    own files must be as it wrote them: there may be somebody's words in the card, or a model that was trained on.
    """
    with _told(folder):
        if not os.path.lexists(folder):
            return
        if not folder.is_dir():
            raise UserError(f"{whole_path(folder)}: is no folder; rule: name a folder for the files")
        if Path.cwd().is_relative_to(folder.resolve()):  # another folder takes its place
            raise UserError(f"{whole_path(folder)}: the current folder lies in it; rule: name another folder")
        if os.path.ismount(folder.resolve()):
            raise UserError(f"{whole_path(folder)}: a disk is mounted there; rule: name a folder in it")
        present = sorted(os.listdir(folder))
    if not present:
        return
    own = _own_files(folder)
    if not own:
        raise UserError(
            f"{whole_path(folder)}: is not empty ({present[0]}), and convert did not fill it; rule: name another folder"
        )
    if not force:
        raise UserError(
            f"{whole_path(folder)}: convert has written there before; rule: name another folder, or replace its files "
            "with --force"
        )
    foreign = next((name for name in present if name in names and name not in own), None)
    if foreign is not None:
        raise UserError(
            f"{whole_path(folder / foreign)}: convert did not write it, so --force does not replace it; rule: move it "
            "away, or name another folder"
        )
    changed = _changed_file(folder)
    if changed is not None:
        way_out = "name another folder" if changed == CARD else "move it away, or name another folder"
        raise UserError(
            f"{whole_path(folder / changed)}: was changed since convert wrote it, so --force does not replace it; "
            f"rule: {way_out}"
        )


def check_apart(folder: Path, checkpoint: Path) -> None:
    """Raise UserError where an export to a folder would replace the checkpoint that it is made of.

    What the new files leave out, such as the other model, would be lost. Files of others in the folder stay.
    """
    place, source = Path(os.path.realpath(folder)), Path(os.path.realpath(checkpoint))
    own = source.parent == place and source.name in _own_files(folder)
    if own or (source == place and _own_files(folder)):
        raise UserError(
            f"{whole_path(folder)}: its files are the checkpoint {checkpoint}, and would be replaced; rule: name "
            "another folder"
        )


def write_export(
    folder: Path, files: Sequence[ExportedFile], card: str, *, force: bool, advance: Advance = lambda count: None
) -> None:
    """Write files and the card as a folder, whole or not at all; raises UserError as `check_target` does, too.

    The files are written to a folder beside it, which takes the folder's place when it is whole; those that killed
    exports left there are deleted. force: see `check_target`.
    """
    names = [file.name for file in files]
    check_target(folder, names, force=force)
    with _told(folder):
        place = folder.resolve()  # a link to a folder stays a link
        part = place.with_name(f".{place.name}.{os.getpid()}.part")
        with _told(place.parent):  # it may be that the folder itself can be written, and not the one above
            place.parent.mkdir(parents=True, exist_ok=True)
            with _alone_in(place.parent) as alone:
                _put_back(place, alone=alone)
                _remove_abandoned(place, alone=alone)
                check_target(folder, names, force=force)
                needed, free = sum(file.size for file in files) + _SPARE, free_bytes(place.parent)
                if free < needed:
                    raise UserError(
                        f"{whole_path(folder)}: {free / 2**20:,.0f} MiB are free there, the files take "
                        f"{needed / 2**20:,.0f}; rule: make room, or name another folder"
                    )
                part.mkdir()
                lock = folder_descriptor(part)
                _lock(lock)
        try:
            for file in files:
                _write(file, part / file.name, advance)
            _write(text_file(CARD, _marked(card, [part / name for name in names])), part / CARD, advance)
            with _alone_in(place.parent):
                check_target(folder, names, force=force)  # another export may have taken the place meanwhile
                _take_place(part, place)
        except BaseException:
            with suppress(OSError):
                _clear(part, place)
            raise
        finally:
            os.close(lock)


def _write(file: ExportedFile, path: Path, advance: Advance) -> None:
    """Write a file, and wait until the disk has it: some disks say only then that they are full."""
    with open(path, "wb", opener=regular_only) as out:
        told = ToldFile(out, advance)
        try:
            file.write(told)  # type: ignore[arg-type]
        except RuntimeError as error:
            if told.failure is None:
                raise
            raise told.failure from error
        out.flush()
        os.fsync(out.fileno())


@contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """Let one export at a time change names in a folder; yields whether that is sure: some file systems have no locks.

    Whoever leaves the block, killed too, gives the lock back.
    """
    descriptor, alone = None, False
    with suppress(OSError):  # of a folder that may be written but not listed
        descriptor = folder_descriptor(folder)
    try:
        end = time.monotonic() + _LOCK_SECONDS
        while descriptor is not None and not alone and time.monotonic() < end:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        yield alone
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _remove_abandoned(place: Path, *, alone: bool) -> None:
    """Delete what killed exports to a place have left beside it, each as large as a model; a live one holds a lock.

    alone: whether no other export is between making its folder and locking it.
    """
    parts = re.compile(rf"\.{re.escape(place.name)}\.\d+\.part")
    with suppress(OSError):  # of a folder above that may be written but not listed, or of a part that is gone meanwhile
        for part in [part for part in place.parent.iterdir() if parts.fullmatch(part.name) and part.is_dir()]:
            lock = folder_descriptor(part)
            try:
                if (alone or _old(os.fstat(lock).st_mtime)) and _lock(lock):
                    _clear(part, place)
            finally:
                os.close(lock)


def _old(changed: float) -> bool:
    """Return whether a change lies so far back, or ahead since the clock was set back, that no live export made it."""
    return abs(time.time() - changed) > _LOCKED_AFTER


def _lock(folder: int) -> bool:
    """Return whether an open folder is locked now; not where another process holds the lock, or none can be had."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _marked(card: str, paths: Sequence[Path]) -> str:
    """Return a card whose last lines name the files of an export, with their sums and the card's own."""
    body = card.encode(errors="backslashreplace").decode().rstrip()
    sums = ", ".join([*(f"{path.name} {_sum(path)}" for path in paths), f"{CARD} {_card_sum(body)}"])
    own = ", ".join([*(path.name for path in paths), CARD])
    return f"{body}\n\n<!-- their sums: {sums} -->\n<!-- files of cosmos-scale convert: {own} -->\n"


def _sum(path: Path) -> str:
    """Return a digest of a file's size and of both its ends."""
    with open(path, "rb", opener=regular_only) as file:
        digest = hashlib.sha256(file.read(_SUMMED))
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - _SUMMED))
        digest.update(file.read() + b"%d" % size)
    return digest.hexdigest()[:16]


def _card_sum(body: str) -> str:
    """Return a digest of a card's text without its last lines."""
    return hashlib.sha256(body.rstrip().encode()).hexdigest()[:16]


def _mark(folder: Path) -> tuple[str, re.Match[str] | None]:
    """Return the card of a folder, and its lines that tell what an export wrote; None where there are none."""
    try:
        card = read_regular(folder / CARD).decode(errors="replace")
    except OSError:
        return "", None
    return card, next(reversed(list(_OWN.finditer(card))), None)


def _own_files(folder: Path) -> list[str]:
    """Return which files an export wrote to a folder, by its card; none where there is no such card."""
    found = _mark(folder)[1]
    names = found[2].split(", ") if found else []
    return [name for name in names if re.fullmatch(r"\w[\w.-]*", name)]  # the card may be edited, or another's


def _changed_file(folder: Path) -> str | None:
    """Return the first file of an export that is no longer as it was written, the card first; None where all are."""
    card, found = _mark(folder)
    if found is None:
        return None
    sums = dict(re.findall(r"(\S+) ([0-9a-f]{16})", found[1] or ""))
    if card[found.end() :].strip() or sums.get(CARD, "") not in ("", _card_sum(card[: found.start()])):
        return CARD
    for name in _own_files(folder):
        with _told(folder), suppress(FileNotFoundError):
            if name != CARD and sums.get(name, "") not in ("", _sum(folder / name)):
                return name
    return None


def _take_place(part: Path, place: Path) -> None:
    """Let a whole folder take a place; what others had put into the folder that was there moves along.

    Where the system can exchange two names at once, the place has a whole folder at every moment.
    """
    if not place.exists():
        part.rename(place)
        return
    if _exchange(part, place):
        _clear(part, place)
        return
    own = _own_files(place)
    before = place.with_name(f".{place.name}.{os.getpid()}.before")
    place.rename(before)
    try:
        part.rename(place)
    except BaseException:
        if not place.exists():
            before.rename(place)
        raise
    _move_along(before, own, place)


def _clear(part: Path, place: Path) -> None:
    """Delete an export's hidden folder, whether it holds the new files or, since the exchange, the old ones.

    What others had put into the old folder belongs to the place.
    """
    own = _own_files(part)
    others = own and any(entry.name not in own for entry in part.iterdir())
    if others and place.exists():
        _move_along(part, own, place)
    elif others:
        part.rename(place)
    else:
        shutil.rmtree(part, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; returns False where the system or the disk cannot do that."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # of a system that is not Linux, or an old one
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)


def _move_along(before: Path, own: Sequence[str], place: Path) -> None:
    """Move what others had put into an old folder to the new one, and delete the old one, its card last."""
    for entry in list(before.iterdir()):
        if entry.name not in own:
            entry.rename(place / entry.name)
    for name in own:
        (before / name).unlink(missing_ok=True)
    with suppress(OSError):  # of a file that has come meanwhile: it stays there
        before.rmdir()


def _put_back(place: Path, *, alone: bool) -> None:
    """Give back what an export, killed as its files took the place, had put aside; the place keeps what it has.

    alone: whether no other export is about to do it.
    """
    with suppress(OSError):  # of a folder above that may not be listed
        olds = re.compile(rf"\.{re.escape(place.name)}\.\d+\.before")
        for before in [entry for entry in place.parent.iterdir() if olds.fullmatch(entry.name) and entry.is_dir()]:
            if not alone and not _old(before.stat().st_ctime):
                continue
            if place.exists():
                _move_along(before, _own_files(before), place)
            else:
                before.rename(place)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError which says that the folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{whole_path(folder)}: cannot be written: {reason_of(error)}") from error
