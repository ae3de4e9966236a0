"""What runs that were killed while they saved leave behind, and how it is told from what a live run writes."""

import fcntl
import logging
from pathlib import Path
from typing import IO

from cosmos_scale.files import delete_folder, no_locks, regular_only

_LOG = logging.getLogger(__name__)


class SavingLock:
    """A lock on a folder of checkpoints, which a run holds while it may save there; the first rank's.

    Its file lies beside the folder, `.checkpoints.lock`; a killed run leaves the file, but no lock.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root.with_name(f".{root.name}.lock")
        self._file: IO[bytes] | None = None
        self._told = False

    def take(self) -> bool:
        """Return whether the lock is held, or could be taken now; also where the file system has no locks.

        Raises OSError where the lock's file cannot be written.
        """
        if self._file is not None:
            return True
        file = open(self._path, "ab", opener=regular_only)  # noqa: SIM115 - stays open
        try:
            # Not flock: loader processes inherit such a lock, and would hold it after their parent was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if no_locks(error):
                file.close()
                self._path.unlink(missing_ok=True)
                return True
            file.close()
            if not self._told:
                self._told = True
                _LOG.warning("%s: another run saves there too; what it has not finished stays", self._root)
            return False
        self._file = file
        return True

    def release(self) -> None:
        """Give the lock back and delete its file."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def remove_unfinished(root: Path, lock: SavingLock) -> None:
    """Delete unfinished checkpoints unless another run holds the lock; raises OSError as SavingLock.take does."""
    abandoned = list(root.glob("step-*.tmp"))
    if lock.take():
        for folder in abandoned:
            delete_folder(folder)
