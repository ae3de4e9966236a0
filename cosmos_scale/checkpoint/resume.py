"""Which checkpoint a run starts from, and whether its configuration may go on from there."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.checkpoint.files import BrokenCheckpoint
from cosmos_scale.checkpoint.interchange.reading import of_newest
from cosmos_scale.checkpoint.state import (
    RunState,
    check_files,
    find_checkpoint,
    manifest_digest,
    newest,
    read_manifest,
    read_run_config,
    read_state,
    saved_folders,
    step_of,
)
from cosmos_scale.config import RunConfig
from cosmos_scale.config.compare import Difference, changed_on_resume
from cosmos_scale.errors import UserError

# With another value of one of these, tensors have other shapes; those of positions are resized (`can_resize`).
_KEYS_OF_SHAPES = {"model.embed_dim"} | {
    *(f"model.vision.{key}" for key in ("patch_size", "width", "layers")),
    *(f"model.text.{key}" for key in ("vocab_size", "width", "layers")),
}


class PassedOver(NamedTuple):
    """A broken checkpoint that `resume: auto` passes over, and in one line what is wrong with it."""

    folder: Path
    reason: str


class _Read(NamedTuple):
    """A checkpoint with its state, the config of its run, and the digest of its manifest."""

    folder: Path
    state: RunState
    written: RunConfig
    manifest: str


@dataclass(frozen=True)
class Start:
    """Where a run starts: at `state` of `checkpoint`, or at step 0 where both are None.

    broken: newer checkpoints, which were passed over. manifest: digest of the checkpoint's manifest. unread: the
    config's `init_from` where the run that goes on began from something else.
    """

    checkpoint: Path | None
    state: RunState | None
    broken: tuple[PassedOver, ...] = ()
    manifest: str | None = None
    unread: Path | None = None

    @property
    def lost_shards(self) -> dict[str, int]:
        """The shards given up before this start, each with the step from which on its samples are replaced."""
        return {} if self.state is None else self.state.lost_shards

    def describe_unread(self) -> str:
        """Return that `init_from` is not read, on one line, or nothing where it says nothing else than before."""
        if self.unread is None:
            return ""
        return (
            f"init_from: {self.unread} is not read, since the run goes on from its own checkpoint, and began from "
            f"something else; rule: a new run needs another name"
        )


def find_start(
    config: RunConfig, root: Path, data: str | None, broken: tuple[PassedOver, ...] = (), chosen: Path | None = None
) -> Start:
    """Decide where a run starts, by the config's `resume` and the checkpoints under root.

    data: digest of the run's index, None where a dry run has no index to compare. broken: checkpoints that were found
    broken when they were read; `resume: auto` passes them over too. chosen: the checkpoint that another rank has found
    in the run that `resume` names.
    Raises GoneCheckpoint where the chosen one is deleted meanwhile; UserError where `resume: never` finds another run's
    checkpoint, where the folder named has no checkpoint, where all checkpoints are broken, or where data or keys differ
    that must stay the same.
    """
    if config.resume == "never":
        found = newest(root)
        if found is not None:
            raise UserError(
                f"resume: 'never', but {found} exists; rule: resume=auto goes on from it; for a new run choose another "
                f"name or output, or remove it"
            )
        return Start(None, None)
    if config.resume == "auto":
        folder, broken = _newest_whole(root, broken)
        if folder is None:
            return Start(None, None, broken)
        try:
            read = _read(folder)
        except BrokenCheckpoint as failure:  # it was whole, so somebody deletes it
            return find_start(config, root, data, (*broken, PassedOver(folder, str(failure))))
    elif chosen is not None:
        read = _read_whole(chosen)
    else:
        read = of_newest(Path(config.resume), _read_whole, lambda line: None, find_checkpoint)
    folder, state, written, digest = read
    last = newest(root)
    if config.resume != "auto" and last is not None and step_of(last) > state.step:
        # A later `resume: auto` would start from the newer checkpoint, and what this run adds would be lost.
        raise UserError(
            f"resume: {folder}, but {last} is newer; rule: resume=auto goes on from the newer one; to go back, move "
            f"newer ones away, or choose another output"
        )
    changed = changed_on_resume(written, config)
    if changed:
        raise UserError(
            f"resume from {folder}: {'; '.join(map(str, changed))}; rule: only paths, workers, logging and limits may "
            f"change{_on_longer_schedules(changed)}; set them back, or start a new run "
            f"{_new_run(config, root, folder, changed)}"
        )
    if data is not None and state.data != data:
        raise UserError(
            f"resume from {folder}: the shards of data.sources are not those of its run (index digest {state.data}, "
            f"now {data}); rule: the order of samples must stay (start a new run "
            f"{_new_run(config, root, folder)})"
        )
    return Start(folder, state, broken, digest, _other_weights(written, config))


def _other_weights(written: RunConfig, config: RunConfig) -> Path | None:
    """Return the config's `init_from` where the run began from something else."""
    now, then = config.init_from, written.init_from
    if now is None or (then is not None and now.absolute() == then.absolute()):
        return None
    return now


def _read_whole(folder: Path) -> _Read:
    """Read what `_read` does of a checkpoint whose files are as they were written; raises BrokenCheckpoint."""
    check_files(folder, read_manifest(folder))
    return _read(folder)


def _read(folder: Path) -> _Read:
    return _Read(folder, read_state(folder), read_run_config(folder), manifest_digest(folder))


def _on_longer_schedules(changed: Sequence[Difference]) -> str:
    """Return why a run cannot be made longer, where one of the changed keys says how long it is."""
    if not {"train.epochs", "train.schedule_steps"} & {difference.key for difference in changed}:
        return ""
    return " (the learning rate and the teacher's momentum have followed the schedule of the former length)"


def _new_run(config: RunConfig, root: Path, folder: Path, changed: Sequence[Difference] = ()) -> str:
    """Return how to start a new run, under a free name: from a checkpoint's weights where they fit."""
    fits = not any(one.key in _KEYS_OF_SHAPES for one in changed)
    overrides = [f"init_from={folder}"] if fits else []
    if newest(root) is not None:
        names = (f"{config.name}-{number}" for number in count(2))
        overrides.append(f"name={next(name for name in names if not (config.output / name).exists())}")
    if config.resume != "auto":
        overrides.append("resume=auto")
    what = "from its weights with" if fits else "(its weights do not fit another model) with"
    return f"{what}: {shlex.join(overrides)}"


def set_aside(folder: Path) -> Path | None:
    """Rename a broken checkpoint, so that it no longer counts as one; return its new name, None where it is gone.

    The run goes on from an older checkpoint, so the steps that it saves next come before the broken checkpoint's step.
    Under its old name the broken checkpoint would be the newest one again, and keep_last would keep it.
    Raises UserError where it cannot be renamed.
    """
    names = (folder.with_name(f"{folder.name}.broken{'' if number == 1 else f'-{number}'}") for number in count(1))
    free = next(name for name in names if not name.exists())
    try:
        folder.rename(free)
    except FileNotFoundError:
        return None
    except OSError as failure:
        raise UserError(f"checkpoint {folder}: broken, and cannot be renamed: {failure.strerror}") from failure
    return free


def _newest_whole(root: Path, broken: tuple[PassedOver, ...]) -> tuple[Path | None, tuple[PassedOver, ...]]:
    """Return the newest checkpoint under root without a known fault, and what is wrong with newer checkpoints."""
    known = {passed.folder for passed in broken}
    for folder in reversed(saved_folders(root)):
        if folder in known:
            continue
        try:
            check_files(folder, read_manifest(folder))
        except BrokenCheckpoint as failure:
            broken = (*broken, PassedOver(folder, str(failure)))
            continue
        return folder, broken
    if any(passed.folder.exists() for passed in broken):
        raise UserError(
            f"resume: no checkpoint under {root} is whole; the newest: {broken[0].reason}; rule: mend or move them away"
        )
    return None, broken
