"""Room for checkpoints: which old ones a run deletes, after a new one is whole, or before where the disk is short."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from cosmos_scale.checkpoint.state import checkpoints, step_of
from cosmos_scale.config import CheckpointConfig


def superfluous(root: Path, config: CheckpointConfig, keep: int) -> list[Path]:
    """Return the checkpoints, oldest first, that are neither among the newest `keep` nor kept for good."""
    every = config.keep_every
    return [old for old in checkpoints(root)[:-keep] if every is None or step_of(old) % every != 0]


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; what cannot be deleted harms no run."""
    going = folder.with_name(f"{folder.name}.old.tmp")
    with suppress(OSError):
        folder.rename(going)  # under its own name, half deleted, it would look like a damaged one
        shutil.rmtree(going)


def prunable(root: Path, config: CheckpointConfig) -> list[Path]:
    """Return the checkpoints that may go before a new one is written, where room is short: the newest one never."""
    return superfluous(root, config, max(1, config.keep_last - 1))


def make_room(root: Path, config: CheckpointConfig) -> list[Path]:
    """Delete the oldest prunable checkpoints until a new one as large as the newest has room; return what has gone."""
    gone: list[Path] = []
    before = checkpoints(root)
    needed = bytes_of(before[-1]) if before else 0
    for old in prunable(root, config):
        if free_bytes(root) >= needed:
            break
        delete_checkpoint(old)
        gone.append(old)
    return gone


def bytes_of(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    with suppress(OSError):
        return sum(file.stat().st_size for file in folder.iterdir())
    return 0


def free_bytes(folder: Path) -> float:
    """Return the free bytes of a folder's disk, inf where its file system does not say; raises OSError."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else float("inf")
