"""Which checkpoint a run starts from, and whether its configuration may go on from there."""

from dataclasses import dataclass
from pathlib import Path

from cosmos_scale.checkpoint.files import BrokenCheckpoint
from cosmos_scale.checkpoint.state import (
    RunState,
    check_files,
    checkpoints,
    find_checkpoint,
    newest,
    read_manifest,
    read_run_config,
    read_state,
)
from cosmos_scale.config import RunConfig
from cosmos_scale.config_file import changed_on_resume
from cosmos_scale.errors import UserError


@dataclass(frozen=True)
class Start:
    """Where a run starts: at `state` of `checkpoint`, or at step 0 where both are None.

    broken: what is wrong with newer checkpoints, which were passed over.
    """

    checkpoint: Path | None
    state: RunState | None
    broken: tuple[str, ...] = ()


def find_start(config: RunConfig, root: Path, data: str, broken: tuple[str, ...] = ()) -> Start:
    """Decide by `resume` and the checkpoints under root; data is the digest of the run's index.

    broken: what was found wrong with the newest checkpoints when they were read; `resume: auto` passes them over too.
    Raises UserError where `resume: never` would mix two runs, where no whole checkpoint is at the place named or left,
    or where keys or the data differ that may not.
    """
    if config.resume == "never":
        found = newest(root)
        if found is not None:
            raise UserError(f"resume: 'never', but {found} exists; rule: choose another name or output, or remove it")
        return Start(None, None)
    last = newest(root)
    if config.resume == "auto":
        folder, broken = _newest_whole(root, broken)
        last = folder
    else:
        folder = find_checkpoint(Path(config.resume))
    if folder is None:
        return Start(None, None)
    if last is not None and folder.resolve() != last.resolve() and folder.parent.resolve() == last.parent.resolve():
        # A later resume: auto would take the newer one and so leave what this run adds.
        raise UserError(f"resume: {folder}, but {last} is newer; rule: move newer ones away, or choose another output")
    state = read_state(folder)
    changed = changed_on_resume(read_run_config(folder), config)
    if changed:
        raise UserError(
            f"resume from {folder}: {', '.join(changed)} differ from its run; rule: only paths, workers, logging and "
            "limits may change (start anew from its weights with init_from)"
        )
    if state.data != data:
        raise UserError(
            f"resume from {folder}: the shards of data.sources are not those of its run (index digest {state.data}, "
            f"now {data}); rule: the order of samples must stay (start anew from its weights with init_from)"
        )
    return Start(folder, state, broken)


def _newest_whole(root: Path, broken: tuple[str, ...]) -> tuple[Path | None, tuple[str, ...]]:
    """The newest checkpoint under root of which nothing is known to be wrong, and what is wrong with newer ones."""
    found = list(reversed(checkpoints(root)))
    for folder in found[len(broken) :]:
        try:
            check_files(folder, read_manifest(folder))
        except BrokenCheckpoint as failure:
            broken = (*broken, str(failure))
            continue
        return folder, broken
    if broken:
        raise UserError(
            f"resume: no checkpoint under {root} is whole; the newest: {broken[0]}; rule: mend or move them away"
        )
    return None, ()
