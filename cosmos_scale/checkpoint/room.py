"""Room for checkpoints: which old ones a run deletes, after a new one is whole, or before where the disk is short."""

import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cosmos_scale.checkpoint.state import MANIFEST, checkpoints, step_of
from cosmos_scale.config import CheckpointConfig
from cosmos_scale.files import delete_folder, load_json, read_regular

_LOG = logging.getLogger(__name__)
_OWN = re.compile(rf"{re.escape(MANIFEST)}|fragments-\d+\.\w+")  # files of a checkpoint


def superfluous(root: Path, config: CheckpointConfig, keep: int) -> list[Path]:
    """Return the checkpoints, oldest first, that are beyond the `keep` to be kept and not kept for good.

    For good stay those at multiples of keep_every, and those that nobody may write to: users protect one that way.
    The oldest are beyond them, but first those after which no step has changed a weight until the next checkpoint: else
    a run whose steps are all skipped would lose the checkpoints from before its weights went bad.
    """
    found, every = checkpoints(root), config.keep_every
    passing = [
        n
        for n, folder in enumerate(found[:-1])
        if (every is None or step_of(folder) % every != 0) and not _is_protected(folder)
    ]
    count = sum(n < len(found) - keep for n in passing)
    if count == 0:
        return []
    # Only of these, and not of those that are kept for good: a manifest is long, and there may be hundreds.
    unchanged = [n for n in passing if (own := _updates(found[n])) is not None and own == _updates(found[n + 1])]
    going = [*unchanged, *(n for n in passing if n not in unchanged)][:count]
    return [found[n] for n in sorted(going)]


def _is_protected(checkpoint: Path) -> bool:
    """Tell whether a checkpoint's folder is read-only; the superuser, who may delete it all the same, did not mean to.

    Of one that cannot be deleted only the name would go, and with it the checkpoint from all lists.
    """
    if checkpoint.is_symlink():  # the link goes, its target stays
        return False
    try:
        return not checkpoint.stat().st_mode & 0o222 or not os.access(checkpoint, os.W_OK | os.X_OK)
    except OSError:  # it is gone
        return False


def _updates(checkpoint: Path) -> int | None:
    """Return the AdamW updates done before a checkpoint; None where its manifest does not say it."""
    try:
        count = load_json(read_regular(checkpoint / MANIFEST))["state"]["updates"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return count if isinstance(count, int) else None


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; what cannot be deleted harms no run.

    What a user has put into its folder, such as an export of it, stays: in a folder STEP.others beside it.
    """
    going = folder.with_name(f"{folder.name}.old.tmp")
    with suppress(OSError):
        _keep_others(folder)
        folder.rename(going)  # under its own name, half deleted, it would look like a damaged one
        delete_folder(going)


def _keep_others(checkpoint: Path) -> None:
    """Move what is no part of a checkpoint out of its folder, before that one is deleted; raises OSError."""
    if checkpoint.is_symlink():  # the link goes, its target stays
        return
    names = [name for name in os.listdir(checkpoint) if not (_OWN.fullmatch(name) or name.startswith("."))]
    if names:
        others = checkpoint.with_name(f"{checkpoint.name}.others")
        number = 0
        while os.path.lexists(others):  # the run went back, and has come to this step again
            others, number = checkpoint.with_name(f"{checkpoint.name}.others.{number}"), number + 1
        others.mkdir()
        for name in names:
            (checkpoint / name).rename(others / name)
        _LOG.warning(
            "checkpoint %s: deleted; what else lay in its folder (%s) is in %s now", checkpoint, _shown(names), others
        )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


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


def no_file_is_left(folder: Path) -> bool:
    """Tell whether a folder's disk has as many files as it can have, whatever bytes are free."""
    with suppress(OSError):
        disk = os.statvfs(folder)
        return disk.f_files > 0 and disk.f_favail == 0
    return False
