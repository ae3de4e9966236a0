"""Writing checkpoints beside the training: a copy in memory, then files, manifest and rename in a thread.

The step that asks for a checkpoint waits for the copy only. Ranks say by files that theirs are whole, so that no
collective runs beside those of the training; the first rank, which sees them all, then makes the checkpoint count.
"""

import json
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_scale.checkpoint.files import FileRecord, write_tensors
from cosmos_scale.checkpoint.state import KINDS, RunState, checkpoint_name, checkpoints, sync_folder, write_manifest
from cosmos_scale.config import CheckpointConfig
from cosmos_scale.errors import UserError
from cosmos_scale.fragments import Fragment

POLL = 0.05  # seconds between looks for the other ranks' files


class CheckpointWriter:
    """Saves a run's checkpoints, one at a time, and deletes those that need not stay.

    A context: leaving it waits for the checkpoint under way, unless an error that other ranks may not share leaves it.
    Holds a copy of what this rank saves: 16 bytes for each of its parameters.
    """

    def __init__(
        self, root: Path, fragments: Sequence[Fragment], group: dist.ProcessGroup, config: CheckpointConfig
    ) -> None:
        """root: folder of the checkpoints. group: of all ranks, on the CPU."""
        self.root = root
        self._fragments = [fragment for fragment in fragments if fragment.owned]
        self._group, self._rank, self._world_size = group, dist.get_rank(group), dist.get_world_size(group)
        self._config = config
        self._copies = self._allocate()
        self._thread: threading.Thread | None = None
        self._saving: Path | None = None
        self._error: str | None = None
        self._written = threading.Event()  # this rank's file, or the error that prevented it
        self._given_up = threading.Event()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # All ranks raise a UserError together; after another error some may be gone, and waiting for them is in vain.
        if kind is None or issubclass(kind, UserError):
            self.wait()

    def save(self, state: RunState) -> None:
        """Copy this rank's fragments and start writing them as the checkpoint of a step; collective.

        Raises UserError on every rank where the checkpoint before it could not be written, or its folder not be made.
        """
        self.wait()
        final = self.root / checkpoint_name(state.step)
        temporary = final.with_suffix(".tmp")
        error = None
        if self._rank == 0:
            try:
                for abandoned in self.root.glob("step-*.tmp"):  # of runs that were killed while they saved
                    shutil.rmtree(abandoned, ignore_errors=True)
                temporary.mkdir(parents=True)
            except OSError as failure:
                error = f"checkpoint {temporary}: {failure.strerror}"
        self._raise_together(error)
        for fragment, copies in zip(self._fragments, self._copies, strict=True):
            for kind, tensor in fragment.tensors().items():
                copies[kind].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._saving, self._error = final, None
        self._written.clear()
        self._given_up.clear()
        self._thread = threading.Thread(target=self._write, args=(temporary, final, state), daemon=True)
        self._thread.start()

    def wait(self) -> Path | None:
        """Wait for the checkpoint under way and return its folder, None where there is none; collective.

        Raises UserError on every rank where one of them could not write; the checkpoints before it stand.
        """
        if self._thread is None:
            return None
        self._written.wait()
        try:
            self._raise_together(self._error)
        except UserError:
            self._given_up.set()  # the first rank would wait for a file that will not come
            raise
        finally:
            self._thread.join()
            self._thread = None
        self._raise_together(self._error)
        return self._saving

    def _write(self, temporary: Path, final: Path, state: RunState) -> None:
        """In the thread: write this rank's file, then on the first rank what makes it a checkpoint."""
        path = temporary / f"fragments-{self._rank:05d}.safetensors"
        try:
            tensors = {
                f"{fragment.name}|{kind}": copies[kind]
                for kind in KINDS
                for fragment, copies in zip(self._fragments, self._copies, strict=True)
            }
            record = write_tensors(path, tensors)
            pieces = [(part.name, list(part.shape), part.start, part.weight.numel()) for part in self._fragments]
            part = _record_path(temporary, self._rank).with_suffix(".part")
            part.write_text(json.dumps([record, pieces]))
            part.rename(part.with_suffix(".json"))  # whole at once
        except OSError as failure:
            self._error = f"checkpoint {path}: {failure.strerror or failure} (rank {self._rank})"
        self._written.set()
        if self._rank > 0 or self._error is not None:
            return
        try:
            self._commit(temporary, final, state)
        except OSError as failure:
            self._error = f"checkpoint {final}: {failure.strerror or failure}"

    def _commit(self, temporary: Path, final: Path, state: RunState) -> None:
        records = [_record_path(temporary, rank) for rank in range(self._world_size)]
        while not all(record.exists() for record in records):
            if self._given_up.is_set():
                return
            time.sleep(POLL)
        ranks = []
        for record in records:
            file, pieces = json.loads(record.read_text())
            if pieces:
                ranks.append((FileRecord(*file), pieces))
            else:  # this rank owns nothing that another does not save
                (temporary / file[0]).unlink()
            record.unlink()
        write_manifest(temporary, state, ranks)
        displaced = final.with_name(f"{final.name}.old.tmp")
        if final.exists():  # of a run that went back behind it
            final.rename(displaced)
        temporary.rename(final)
        sync_folder(self.root)
        shutil.rmtree(displaced, ignore_errors=True)
        self._prune(final)

    def _prune(self, final: Path) -> None:
        """Delete all but the newest and those that are kept for good."""
        for old in checkpoints(self.root)[: -self._config.keep_last]:
            step = int(old.name.removeprefix("step-"))
            for_good = self._config.keep_every is not None and step % self._config.keep_every == 0
            if old != final and not for_good:  # a run that went back to an older checkpoint saves below the newest
                shutil.rmtree(old, ignore_errors=True)

    def _allocate(self) -> list[dict[str, Tensor]]:
        """Memory for the copies, touched: a page that is first touched while the training waits costs as much again."""
        pinned = torch.cuda.is_available()
        return [
            {kind: torch.zeros(fragment.weight.numel(), pin_memory=pinned).fill_(0.0) for kind in KINDS}
            for fragment in self._fragments
        ]

    def _raise_together(self, error: str | None) -> None:
        errors: list[str | None] = [None] * self._world_size
        dist.all_gather_object(errors, error, group=self._group)
        failed = next((text for text in errors if text is not None), None)
        if failed is not None:
            raise UserError(f"{failed}; the previous checkpoints are untouched")


def _record_path(folder: Path, rank: int) -> Path:
    return folder / f"fragments-{rank:05d}.json"
