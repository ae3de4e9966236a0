"""A run's folder: it is made and looked at before any work, so that what is wrong with it is told at once."""

import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cosmos_scale.checkpoint.room import bytes_of, prunable
from cosmos_scale.config import CheckpointConfig, RunConfig
from cosmos_scale.config.load import dump_config
from cosmos_scale.errors import UserError
from cosmos_scale.files import regular_only, whole_file

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
DAMAGE_FILE = "damaged.jsonl"
WANDB_ID = "wandb_id"
SUPERSEDED_WANDB_ID = "wandb_id_superseded"
CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation"

MIB = 2**20


def evaluation_folder(folder: Path, evaluator: str, step: int, model: str) -> Path:
    """Return where an evaluator of this name leaves files of a model at a step; folder: the run's."""
    return folder / EVALUATION / evaluator / f"step-{step:08d}" / model


def check_folder(config: RunConfig, folder: Path) -> None:
    """Raise UserError where a run cannot write to its folder, which need not exist; leaves nothing behind."""
    with _told(folder):
        existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        _try_to_write(config, existing)
        for name in (CONFIG_FILE, METRICS_FILE, DAMAGE_FILE, WANDB_ID, SUPERSEDED_WANDB_ID):
            if (folder / name).exists() and not (folder / name).is_file():
                raise UserError(f"output: {folder / name} is no file; rule: move it away, since the run writes a file")
        evaluations = (f"{EVALUATION}/{evaluator.name}" for evaluator in config.eval)
        for name in (CHECKPOINTS, "tensorboard", "wandb", EVALUATION, *evaluations):
            if (folder / name).exists() and not (folder / name).is_dir():
                raise UserError(f"output: {folder / name} is no folder; rule: move it away, since the run makes one")
            if name != CHECKPOINTS and os.path.islink(folder / name) and not (folder / name).exists():
                raise _link_to_nowhere(folder / name)
        if os.path.lexists(folder / CHECKPOINTS):  # it may be another user's, or a link to a disk that is full or gone
            with _told(folder / CHECKPOINTS):
                _try_to_write(config, folder / CHECKPOINTS)
        for name in (METRICS_FILE, DAMAGE_FILE):
            if (folder / name).exists():
                with _told(folder / name):  # it may be another user's in a folder that both can write to
                    open(folder / name, "ab", opener=regular_only).close()
            elif os.path.islink(folder / name):  # a run may make the file that is not there, but not its folder
                target = Path(os.path.realpath(folder / name))
                if target.is_symlink() or not target.parent.is_dir():
                    raise _link_to_nowhere(folder / name)


def check_disk_room(folder: Path, needed: int, config: CheckpointConfig) -> None:
    """Raise UserError where the disk of a run's checkpoints has no room for one of `needed` bytes.

    Without it such a run would end at its first checkpoint. What killed runs have left there counts as free, and so do
    the old checkpoints that a run deletes where room is short.
    """
    root = folder / CHECKPOINTS
    existing = next(path for path in (root, *root.absolute().parents) if path.exists())
    with _told(folder):
        disk = os.statvfs(existing)
    if disk.f_blocks == 0:  # a file system that does not say
        return
    free = disk.f_bavail * disk.f_frsize
    with suppress(OSError):
        free += sum(file.stat().st_size for file in root.glob("step-*.tmp/*"))
    with suppress(OSError, UserError):
        free += sum(bytes_of(old) for old in prunable(root, config))
    if free < needed:
        raise UserError(
            f"output: {existing} has {free / MIB:,.0f} MiB left, but a checkpoint takes {needed / MIB:,.0f}; "
            "rule: make room, or choose another output"
        )


def check_file_size(needed: int, ranks: int) -> None:
    """Raise UserError where files may not be as large as the largest of a checkpoint; needed: bytes of all its tensors.

    Each rank writes one file. The largest is at least the mean of all.
    """
    allowed, least = resource.getrlimit(resource.RLIMIT_FSIZE)[0], needed / ranks
    if allowed != resource.RLIM_INFINITY and allowed < least:
        raise UserError(
            f"output: a checkpoint takes files of {least / MIB:,.1f} MiB and more, but files may have "
            f"{allowed / MIB:,.1f} MiB; rule: raise the limit (ulimit -f unlimited)"
        )


def prepare_folder(config: RunConfig, folder: Path) -> None:
    """Make a run's folder and leave the resolved configuration there; raises UserError where it cannot be used."""
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / CONFIG_FILE) as part:
            part.write_text(dump_config(config), encoding="utf-8")


def _link_to_nowhere(path: Path) -> UserError:
    target = os.readlink(path)
    return UserError(
        f"output: {path} is a link to {target}, which is not there; rule: bring it back, or remove the link"
    )


def _try_to_write(config: RunConfig, folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(dump_config(config).encode())  # on a full disk a file can be made, and nothing be written to it


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as failure:
        raise UserError(f"output: {folder} cannot be written to: {failure.strerror}") from failure
