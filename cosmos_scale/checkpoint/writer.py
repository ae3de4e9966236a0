"""Writing checkpoints beside the training: a copy in memory, then files, manifest and rename in a thread.

The step that asks for a checkpoint waits for the copy only. A rank that has written its tensors says so by a small
file, so that no collective runs beside the training's collectives. The first rank waits for the small files of all
ranks and then turns the folder into a checkpoint.
"""

import errno
import json
import logging
import os
import resource
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from cosmos_scale.checkpoint.files import FileRecord, write_tensors
from cosmos_scale.checkpoint.room import delete_checkpoint, free_bytes, make_room, no_file_is_left, superfluous
from cosmos_scale.checkpoint.snapshot import Snapshot
from cosmos_scale.checkpoint.state import (
    RunState,
    checkpoint_name,
    checkpoints,
    write_manifest,
)
from cosmos_scale.checkpoint.unfinished import SavingLock, remove_unfinished
from cosmos_scale.config import CheckpointConfig
from cosmos_scale.errors import JointError, UserError
from cosmos_scale.files import NO_ROOM, delete_folder, load_json, read_regular, sync_folder, whole_file
from cosmos_scale.fragments import Fragment

_LOG = logging.getLogger(__name__)

POLL = 0.05  # seconds between looks for the other ranks' files
SEEN_WITHIN = 60.0  # seconds after which a file that another rank has written must be seen here
LAST_SECONDS = 10.0  # given to the checkpoint under way after an error that other ranks may not have


class CheckpointWriter:
    """Saves a run's checkpoints, one at a time, and deletes old checkpoints that need not stay.

    A checkpoint that cannot be written is told, and the run goes on: `save_again` writes it once more from its copy.
    `checkpoint.failures` of them in a row raise UserError.

    A context: its end waits for the checkpoint under way; after an error that other ranks may not have, it waits only
    LAST_SECONDS. Holds a copy of what this rank saves: 16 bytes for each of its elements, until the context ends.
    """

    def __init__(
        self, root: Path, fragments: Sequence[Fragment], group: dist.ProcessGroup, config: CheckpointConfig
    ) -> None:
        """root: folder of the checkpoints. group: of all ranks, on the CPU."""
        self.root = root
        self._fragments = [fragment for fragment in fragments if fragment.owned]
        self._group, self._rank, self._world_size = group, dist.get_rank(group), dist.get_world_size(group)
        self._config = config
        self._lock = SavingLock(root)
        on_gpu = any(fragment.weight.is_cuda for fragment in self._fragments)
        self._snapshot = Snapshot(self._fragments, on_gpu=on_gpu)
        self._thread: threading.Thread | None = None
        self._saving: Path | None = None
        self._state: RunState | None = None  # of the copies
        self._error: str | None = None
        self._failures = 0  # in a row
        self._written = threading.Event()  # this rank's file, or else `_error` says why not
        self._all_written = threading.Event()
        self._given_up = threading.Event()

    def __enter__(self) -> "CheckpointWriter":
        if self._rank == 0 and self.root.is_dir():
            with suppress(OSError):  # of a disk that is full, or away for a while
                remove_unfinished(self.root, self._lock)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._leave(kind, error)
            if kind is None or issubclass(kind, JointError):  # else the thread may still write
                self._snapshot.free()
        finally:
            with suppress(OSError):
                self._lock.release()

    def _leave(self, kind: type[BaseException] | None, error: BaseException | None) -> None:
        """Wait for the checkpoint under way as long as is right after an error of this kind."""
        if kind is None:
            self.wait()
        elif issubclass(kind, JointError):
            try:
                self.wait()
            except UserError as failure:
                raise JointError(f"{error}; and {failure}") from failure
        elif issubclass(kind, Exception) and self._thread is not None:
            # Other ranks may have ended. Wait a short time only: if all had written, the checkpoint still becomes
            # whole.
            self._thread.join(LAST_SECONDS)

    def unsaved(self) -> bool:
        """Whether this rank knows that the checkpoint under way cannot be written; other ranks may not know yet."""
        return self._error is not None

    def save(self, state: RunState) -> None:
        """Copy this rank's fragments and start writing them as the checkpoint of a step; collective.

        The step that was saved last is not saved again: a run that stops right after a checkpoint asks for its step
        twice. Raises UserError on every rank where the checkpoint before is one failure too many.
        """
        if self.root / checkpoint_name(state.step) == self._saving and not self._agree(self._error):
            return
        self._settle_or_tell()
        self._snapshot.take()
        self._begin(state)

    def save_again(self) -> None:
        """Where the first checkpoint in a row failed, start to write it again from its copy; collective.

        Raises UserError on every rank where it is one failure too many.
        """
        state = self._state
        if self._settle_or_tell() and self._failures == 1 and state is not None:
            self._begin(state)

    def finish(self) -> Path | None:
        """Wait for the run's last checkpoint, which is written again as often as may fail in a row; collective.

        Returns the checkpoint saved last, None before the first. Raises UserError on every rank where it is lost.
        """
        state = self._state
        while self._settle_or_tell() and state is not None:
            self._begin(state)
        return self._saving

    def wait(self) -> Path | None:
        """Wait for the checkpoint under way; returns the checkpoint saved last, None before the first; collective.

        Raises UserError on every rank where any rank could not write; earlier checkpoints stay as they are.
        """
        if failure := self._settle():
            raise JointError(_untouched(failure, self.root))
        return self._saving

    def _settle_or_tell(self) -> str | None:
        """Wait for the checkpoint under way and return what failed, which is told; collective.

        Raises UserError on every rank where it is one failure too many.
        """
        failure = self._settle()
        if failure is None:
            return None
        if self._failures >= self._config.failures:
            count = f"; {self._failures} failed in a row (checkpoint.failures)" if self._failures > 1 else ""
            raise JointError(_untouched(failure, self.root) + count)
        if self._rank == 0:
            count = f"failure {self._failures}, {self._config.failures} in a row end the run"
            _LOG.warning("%s; %s", _untouched(failure, self.root), count)
        return failure

    def _settle(self) -> str | None:
        """Wait for the checkpoint under way; return why it could not be written, the same on all ranks; collective."""
        final = self._saving
        if self._state is None or final is None:
            return None
        thread, self._thread, self._state, self._saving = self._thread, None, None, None
        try:
            self._written.wait()
            failure = self._agree(self._error)
            if failure is None:
                self._all_written.set()
                if thread is not None:
                    thread.join()
                failure = self._agree(self._error)
        except Exception:  # another rank has ended, perhaps before its file was written
            if thread is not None:
                thread.join(LAST_SECONDS)
            raise
        self._error = None
        if failure is None:
            if self._failures and self._rank == 0:
                _LOG.warning("checkpoint %s: could be written now", final)
            self._saving, self._failures = final, 0
            return None
        self._failures += 1
        self._given_up.set()  # the first rank would wait for a file that will not come
        if thread is not None:
            thread.join()
        if self._rank == 0:  # nobody can use an unfinished folder, and the disk may be full
            delete_folder(final.with_suffix(".tmp"))
        return failure

    def _begin(self, state: RunState) -> None:
        """Make the folder, which may fail as a write may, and start to write the copies there; collective."""
        final = self.root / checkpoint_name(state.step)
        temporary = final.with_suffix(".tmp")
        failure = None
        if self._rank == 0:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                remove_unfinished(self.root, self._lock)
                self._make_room()
                temporary.mkdir()
            except OSError as error:
                failure = f"checkpoint {temporary}: {_reason(error, self.root)}"
        self._error = self._agree(failure)
        self._saving, self._state = final, state
        for event in (self._written, self._all_written, self._given_up):
            event.clear()
        if self._error is not None:
            self._written.set()
            return
        thread = threading.Thread(target=self._write, args=(temporary, final, state), daemon=True)
        try:
            thread.start()
        except (RuntimeError, MemoryError) as error:  # no room for a thread, perhaps on this rank alone
            self._error = f"checkpoint {temporary}: {error or 'no memory'} (rank {self._rank})"
            self._written.set()
            return
        self._thread = thread

    def _make_room(self) -> None:
        with suppress(UserError):  # of a folder that cannot be listed for a while
            for old in make_room(self.root, self._config):
                _LOG.warning("checkpoint %s: deleted, since the disk has no room for the next one beside it", old)

    def _write(self, temporary: Path, final: Path, state: RunState) -> None:
        """In the thread: write this rank's file; on the first rank, then make the folder a checkpoint."""
        path = temporary / f"fragments-{self._rank:05d}.safetensors"
        # Made beforehand: to say why may fail as well, and the ranks would not learn of an error that ends this thread.
        not_written = f"checkpoint {path}: cannot be written (rank {self._rank})"
        not_whole = f"checkpoint {final}: cannot be made whole"
        try:
            self._snapshot.wait()
            record = write_tensors(path, self._snapshot.tensors)
            pieces = [(part.name, list(part.shape), part.start, part.weight.numel()) for part in self._fragments]
            # Written whole at once: the first rank takes this file as complete as soon as it exists.
            with whole_file(_record_path(temporary, self._rank)) as part:
                part.write_text(json.dumps([record, pieces]))
        except BaseException as failure:
            self._error = not_written
            with suppress(Exception):
                size = 4 * sum(tensor.numel() for tensor in self._snapshot.tensors.values())
                reason = f"{_reason(failure, self.root)}{_room(failure, temporary, size)}"
                self._error = f"checkpoint {path}: {reason} (rank {self._rank})"
        finally:
            self._written.set()
        if self._rank > 0 or self._error is not None:
            return
        try:
            self._commit(temporary, final, state)
        except BaseException as failure:
            self._error = not_whole
            with suppress(Exception):
                self._error = f"checkpoint {final}: {_reason(failure, self.root)}"

    def _commit(self, temporary: Path, final: Path, state: RunState) -> None:
        records = [_record_path(temporary, rank) for rank in range(self._world_size)]
        if not self._seen(records):
            return
        ranks = []
        for record in records:
            file, pieces = load_json(read_regular(record))
            if pieces:
                ranks.append((FileRecord(*file), pieces))
            else:  # the rank has no element that another rank does not save
                (temporary / file[0]).unlink()
            record.unlink()
        write_manifest(temporary, state, ranks)
        displaced = final.with_name(f"{final.name}.old.tmp")
        if os.path.lexists(final):  # the run went back to an earlier step and comes to this step again
            final.rename(displaced)
        temporary.rename(final)
        sync_folder(self.root)
        sync_folder(self.root.parent)  # where the folder of checkpoints may be new
        delete_folder(displaced)
        with suppress(UserError):  # of a folder that cannot be listed for a while: this checkpoint is whole
            self._prune(final)

    def _seen(self, records: Sequence[Path]) -> bool:
        """Wait until every rank's small file exists; return False where a rank could not write."""
        deadline = None
        while missing := [record for record in records if not record.exists()]:
            if self._given_up.is_set():
                return False
            if not missing[0].parent.exists():
                raise OSError(errno.ENOENT, "was removed while it was written")
            if deadline is None and self._all_written.is_set():
                deadline = time.monotonic() + SEEN_WITHIN
            if deadline is not None and time.monotonic() > deadline:
                raise OSError(errno.ENOENT, f"{missing[0].name} is not seen here; rule: all ranks share one folder")
            time.sleep(POLL)
        return True

    def _prune(self, final: Path) -> None:
        """Delete all checkpoints but the newest and those that are kept for good."""
        for old in superfluous(self.root, self._config, self._config.keep_last):
            if old != final:  # a run that went back to an older step may save below the newest
                delete_checkpoint(old)

    def _agree(self, error: str | None) -> str | None:
        """Return the lowest failing rank's error on every rank; collective."""
        errors: list[str | None] = [None] * self._world_size
        dist.all_gather_object(errors, error, group=self._group)
        return next((text for text in errors if text is not None), None)


def _untouched(failure: str, root: Path) -> str:
    with suppress(OSError, UserError):  # of a folder that cannot be listed now
        if not checkpoints(root):
            return f"{failure}; no checkpoint was saved before"
    return f"{failure}; the previous checkpoints are untouched"


def _reason(failure: BaseException, root: Path) -> str:
    """Return what failed. A disk may have room for bytes and for no further file: said, since "no space" misleads."""
    if not isinstance(failure, OSError) or not failure.strerror:
        return repr(failure)
    if failure.errno == errno.ENOSPC and no_file_is_left(root):
        return f"{failure.strerror}: the disk takes no further file (no inode is left), so delete files there"
    return failure.strerror


def _room(failure: BaseException, folder: Path, size: int) -> str:
    """Return how much a file takes and what is left or allowed, where it has no room."""
    if isinstance(failure, OSError) and failure.errno == errno.EFBIG:
        allowed = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        return f", the file takes {size:,} bytes" + (f" and {allowed:,} are allowed (ulimit -f)" if allowed > 0 else "")
    if isinstance(failure, OSError) and failure.errno in NO_ROOM and not no_file_is_left(folder):
        with suppress(OSError):
            return f", the file takes {size:,} bytes and {free_bytes(folder):,.0f} are left"
    return ""


def _record_path(folder: Path, rank: int) -> Path:
    return folder / f"fragments-{rank:05d}.json"
