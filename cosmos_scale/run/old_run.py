"""What an earlier run left in the folder of a run that begins anew: it is kept under another name."""

import os
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from cosmos_scale.config import RunConfig
from cosmos_scale.config.compare import changed_on_resume
from cosmos_scale.config.load import load_config
from cosmos_scale.errors import UserError
from cosmos_scale.run.folder import CONFIG_FILE, DAMAGE_FILE, EVALUATION, METRICS_FILE, SUPERSEDED_WANDB_ID, WANDB_ID
from cosmos_scale.run.logged import records_of

OLD_RUN = "old-run"  # a folder in the run's folder; a second one is called old-run-2
# The records come last: where this is cut short, they are still there, and the rest is moved at the next start.
_OF_THE_RUN = (
    CONFIG_FILE,
    DAMAGE_FILE,
    WANDB_ID,
    SUPERSEDED_WANDB_ID,
    EVALUATION,
    "tensorboard",
    "wandb",
    METRICS_FILE,
)


def keep_old_run(config: RunConfig, folder: Path, last_step: int) -> str:
    """Move what an earlier run left into a folder of its own; return a line that says so, or nothing.

    config: of the run that begins at step 0, for want of a checkpoint. last_step: steps done at its end. A start of the
    same run which ended before its first checkpoint is no earlier run: its steps are taken again.
    Raises UserError where something cannot be moved.
    """
    found = records_of(folder / METRICS_FILE)
    if not _is_of_another_run(config, folder, found) and not _had_a_checkpoint(config, found, last_step):
        return ""
    names = (f"{OLD_RUN}{'' if number == 1 else f'-{number}'}" for number in count(1))
    aside = next(folder / name for name in names if not os.path.lexists(folder / name))
    moved = [name for name in _OF_THE_RUN if (folder / name).exists()]
    try:
        aside.mkdir()
        for name in moved:
            _move(folder / name, aside / name)
    except OSError as error:
        raise UserError(
            f"output: {folder} has an earlier run's records and no checkpoint, and they cannot be moved to {aside}: "
            f"{error.strerror or error}; rule: choose another name or output"
        ) from error
    return f"{folder}: has an earlier run's records and no checkpoint: kept in {aside}: {', '.join(moved)}"


def _is_of_another_run(config: RunConfig, folder: Path, found: list[dict[str, Any]]) -> bool:
    """Whether records of training or evaluation are there, and keys that no resumed run may change have changed."""
    if not any(map(_has_numbers, found)):
        return False
    if config.resume == "never":
        return True
    try:
        return bool(changed_on_resume(load_config(folder / CONFIG_FILE), config))
    except UserError:  # it is gone, or of another version
        return True


def _had_a_checkpoint(config: RunConfig, found: list[dict[str, Any]], last_step: int) -> bool:
    """Whether the records go as far as the first checkpoint; in doubt they do.

    A run saves every so many steps, at its end, and where it is asked to stop and has taken a step.
    """
    if any(entry.get("kind") in ("start", "stop") and _step(entry) > 0 for entry in found):
        return True
    reached = max((_step(entry) for entry in found if _has_numbers(entry)), default=0)
    first_save = min(config.checkpoint.every or last_step, last_step)
    return reached > 0 and reached + config.log.every > first_save


def _has_numbers(entry: Mapping[str, Any]) -> bool:
    return entry.get("kind") in ("train", "eval")


def _step(entry: Mapping[str, Any]) -> int:
    step = entry.get("step")
    return step if isinstance(step, int) else 0


def _move(path: Path, place: Path) -> None:
    """Move a file or folder; of a link copy what it names, since new files go on behind the link."""
    if not path.is_symlink():
        path.rename(place)
    elif path.is_file():
        shutil.copy2(path, place)
    elif path.is_dir():
        shutil.copytree(path, place, symlinks=True)
