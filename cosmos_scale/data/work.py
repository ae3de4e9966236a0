"""Work that writes a folder of shards and can be stopped: what was asked for, what is done so far, who works on it.

Lies in no room of `data`: `data prepare` and `data build` work so, and what indexes or reads shards refuses a folder
whose work is unfinished.
"""

import fcntl
import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_scale.errors import UserError
from cosmos_scale.files import (
    delete_folder,
    load_json,
    make_folder,
    make_output_folder,
    no_locks,
    read_regular,
    regular_only,
    replace_file,
    writing,
)

MANIFEST = "manifest.json"
_PART = re.compile(r".+\.(tar|npy|json|jsonl)\.\d+\.part")  # as `whole_file` names what this work writes


class WorkKind(NamedTuple):
    """A kind of work, and how messages call it.

    folder: name of the folder of what is done so far. foreign: what is wrong with a folder of other shards.
    done_file: the file that says that the work is finished; None: the missing folder says so. needs_lock: whether the
    work is refused on a file system without locks, where two processes could do it at the same time.
    """

    name: str
    doing: str
    command: str
    folder: str
    foreign: str
    done_file: str | None
    needs_lock: bool


PREPARATION = WorkKind(
    *("preparation", "preparing", "data prepare", ".prepare"),
    foreign="holds shards that no preparation made; name another folder with --out",
    done_file=MANIFEST,
    needs_lock=True,
)
BUILD = WorkKind(
    *("build", "building", "data build", ".build"),
    foreign="holds shards already; name an empty folder",
    done_file=None,
    needs_lock=False,
)


class Work(NamedTuple):
    """One piece of work. out: the folder of the shards."""

    kind: WorkKind
    out: Path

    @property
    def folder(self) -> Path:
        """The folder of what is done so far; it is deleted when all is done."""
        return self.out / self.kind.folder

    def report(self, shard: str) -> Path:
        """Return the file that says how a shard was written; it is written after the shard."""
        return self.folder / "shards" / f"{shard}.json"

    def claim(self, shard: str) -> None:
        """Note that a shard's file is this work's own, before it is written; raises UserError."""
        mark = self._mark(shard)
        with writing(mark):
            mark.touch()

    def owns(self, shard: str) -> bool:
        """Whether this work wrote, or began to write, a shard's file."""
        return self._mark(shard).exists() or self.report(shard).exists()

    def _mark(self, shard: str) -> Path:
        return self.folder / "shards" / f"{shard}.begun"

    @property
    def is_unfinished(self) -> bool:
        """Whether the work was begun and not finished."""
        finished = self.kind.done_file is not None and (self.out / self.kind.done_file).exists()
        return self.folder.is_dir() and not finished


@contextmanager
def open_work(work: Work, options: dict[str, Any]) -> Iterator[None]:
    """Begin a piece of work or go on with it, as its only process.

    options: as json values, all that the output depends on.
    Raises: UserError where the folder holds other shards or work with other options, or another process works on it.
    """
    make_output_folder(work.out)
    if not work.folder.exists() and any(work.out.glob("*.tar")):
        raise UserError(f"{work.out}: {work.kind.foreign}")
    make_folder(work.folder)
    with writing(work.folder / "lock"):
        lock_file = open(work.folder / "lock", "w", opener=regular_only)  # noqa: SIM115 - stays open
    with lock_file as lock:
        try:
            # Not flock: workers inherit such a lock, and would hold it after their parent was killed.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, (BlockingIOError, PermissionError)):
                raise UserError(f"{work.out}: another process is {work.kind.doing} it now") from error
            reason = f"{work.out}: cannot be locked: {no_locks(error) or error.strerror or error}"
            if work.kind.needs_lock or not no_locks(error):
                raise UserError(reason) from error
            print(f"{reason}; only one process may write there now", file=sys.stderr)
        _refuse_foreign_shards(work)
        path = work.folder / "options.json"
        if path.exists() and not any(work.folder.glob("shards/*.json")):
            _begin_anew(work, options, _read_options(path))
        if path.exists():
            check_options(work, options, _read_options(path), "begun")
        else:
            replace_file(path, json.dumps(options).encode())
        make_folder(work.folder / "shards")
        _delete_parts(work)
        yield
        _delete_parts(work)  # a killed process's worker may have begun a file after this process went on


def close_work(work: Work) -> None:
    """Delete the folder of finished work; where this is interrupted, the work is finished all the same."""
    finished = work.folder.with_name(f"{work.folder.name}.finished")
    delete_folder(finished)
    work.folder.rename(finished)
    delete_folder(finished)


def _delete_parts(work: Work) -> None:
    """Delete what killed processes have begun to write."""
    for part in work.out.glob("*.part"):
        if _PART.fullmatch(part.name):  # not what a download of the user left
            part.unlink(missing_ok=True)


def _read_options(path: Path) -> dict[str, Any]:
    try:
        options: dict[str, Any] = load_json(read_regular(path))
        return dict(options)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; delete {path.parent.parent} and begin anew") from error


def _refuse_foreign_shards(work: Work) -> None:
    """Raise UserError where shards of the user lie in the folder: they would be indexed, overwritten or deleted."""
    for shard in sorted(work.out.glob("*.tar")):
        if not work.owns(shard.stem):
            raise UserError(
                f"{shard}: lies in the folder of an unfinished {work.kind.name} that did not write it; "
                "move it elsewhere, or name another folder with --out"
            )


def _begin_anew(work: Work, options: dict[str, Any], before: dict[str, Any]) -> None:
    """Forget work with other options that has not written a shard: its loss is not worth an error."""
    if before == options:
        return
    for shard in work.out.glob("*.tar"):  # a whole shard whose writer was killed before the report
        shard.unlink()
    for item in work.folder.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        elif item.name != "lock":
            item.unlink()


def check_options(work: Work, options: dict[str, Any], before: dict[str, Any], done: str) -> None:
    """Raise UserError, naming the first difference, where a folder was made with other options."""
    for name, value in options.items():
        if before.get(name) == value:
            continue
        if name not in before:
            raise UserError(
                f"{work.out}: its {work.kind.name} was {done} by an older version, which did not note {name}: whether "
                "the files are the same is not known; delete the folder, or name another one with --out"
            )
        changed = f" ({name.removesuffix('_digest')} changed since)" if name.endswith("_digest") else ""
        raise UserError(
            f"{work.out}: its {work.kind.name} was {done} with {name} {json.dumps(before[name])}, not "
            f"{json.dumps(value)}{changed}; go on with the same options and files, or name another folder with --out"
        )


def refuse_unfinished(folders: Iterable[Path]) -> None:
    """Raise UserError where the shards of a folder are those of unfinished work."""
    for folder in folders:
        for kind in (PREPARATION, BUILD):
            if Work(kind, folder).is_unfinished:
                raise UserError(
                    f"{folder}: unfinished `{kind.command}`; give the same command again, which goes on where it was, "
                    "or delete the folder"
                )
