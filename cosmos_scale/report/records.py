"""What a run's folder says of the run: its records, damage, checkpoints and config, as far as each can be read."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from cosmos_scale.checkpoint.state import MANIFEST, checkpoints, read_manifest, such_as_runs
from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.config.section import redact_urls
from cosmos_scale.config.yaml_text import parse_yaml
from cosmos_scale.errors import UserError
from cosmos_scale.files import load_json, read_regular, reason_of, whole_path
from cosmos_scale.run.folder import CHECKPOINTS, CONFIG_FILE, DAMAGE_FILE, METRICS_FILE
from cosmos_scale.run.lock import DEAD_AFTER, LOCK_FILE
from cosmos_scale.words import counted

MOST = 1e30  # of what can be drawn: no record of a run that goes well comes near it

Record = dict[str, Any]
"""A line of metrics.jsonl or damaged.jsonl. Where the file is damaged its values may be of any type: `number_of`."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint of a run. written: seconds since 1970. versions: of the packages that wrote it, by name."""

    folder: Path
    step: int
    written: float
    world_size: int
    lost_shards: int
    versions: dict[str, str]
    steps_per_epoch: int | None


@dataclass(frozen=True)
class RunRecords:
    """What was read of a run. tree: the config as plain data, config: the same typed; each None where it is not there.

    train, evaluations, failures, starts, stops: records in the order of steps. running: whether a launch holds the
    folder now; died: whether the last launch left without giving the folder back. notes: what is missing, in sentences.
    """

    folder: Path
    label: str
    train: Sequence[Record] = ()
    evaluations: Sequence[Record] = ()
    failures: Sequence[Record] = ()
    starts: Sequence[Record] = ()
    stops: Sequence[Record] = ()
    damages: Sequence[Record] = ()
    saved: Sequence[SavedCheckpoint] = ()
    tree: dict[str, Any] = field(default_factory=dict)
    config: RunConfig | None = None
    running: bool = False
    died: bool = False
    notes: Sequence[str] = ()

    @property
    def last_step(self) -> int:
        """The last step that has a record or a checkpoint."""
        steps = [int(record["step"]) for record in (*self.train, *self.evaluations)]
        return max([*steps, *(one.step for one in self.saved)], default=0)

    @property
    def world_size(self) -> int | None:
        """The number of ranks of the newest start or checkpoint; None where nothing says it."""
        for record in reversed(self.starts):
            if (ranks := number_of(record, "world_size")) is not None:
                return int(ranks)
        return self.saved[-1].world_size if self.saved else None

    @property
    def global_batch(self) -> int | None:
        """The samples of a step; None where nothing says it."""
        if self.config is not None:
            return self.config.train.global_batch
        for record in reversed(self.train):
            if samples := number_of(record, "samples"):
                return round(samples / max(1, int(record["step"])))
        return None

    @property
    def last_planned_step(self) -> int | None:
        """The step at which the run ends; None where nothing says it."""
        if self.config is None:
            return None
        train = self.config.train
        steps_per_epoch = next((one.steps_per_epoch for one in reversed(self.saved) if one.steps_per_epoch), None)
        if train.schedule_steps:
            total: int | None = train.schedule_steps
        else:
            total = train.epochs * steps_per_epoch if steps_per_epoch else None
        known = [limit for limit in (total, train.max_steps) if limit is not None]
        return min(known) if known else None


def number_of(record: Record, key: str) -> float | None:
    """Return a number of a record that can be drawn; None where the key is not there, or holds anything else."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -MOST < value < MOST:
        return None
    return float(value)


def read_runs(folders: Sequence[Path]) -> list[RunRecords]:
    """Read some runs' folders; each gets a label that no other has.

    Raises UserError where a folder is not there, or holds nothing of a run.
    """
    runs = [_read_run(folder) for folder in folders]
    labels = [run.label for run in runs]
    doubled = {label for label in labels if labels.count(label) > 1}
    return [replace(run, label=str(run.folder)) if run.label in doubled else run for run in runs]


def _read_run(folder: Path) -> RunRecords:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{whole_path(folder)}: {what}; rule: name the folder of a run, such as runs/NAME")
    if not any((folder / name).exists() for name in (METRICS_FILE, CONFIG_FILE, CHECKPOINTS)):
        rule = f"the folder of a run holds {METRICS_FILE} and {CONFIG_FILE}{such_as_runs(folder)}"
        raise UserError(f"{folder}: no run; rule: {rule}")
    notes: list[str] = []
    tree, config = _config(folder / CONFIG_FILE, notes)
    records = _lines(folder / METRICS_FILE, _is_metric, notes, missing="so that there are no curves")
    damages = _lines(folder / DAMAGE_FILE, _is_damage, notes)
    held, alive = _lock_of(folder)
    saved = _saved(folder / CHECKPOINTS, notes)
    name = config.name if config is not None else tree.get("name")
    return RunRecords(
        folder=folder,
        label=name if isinstance(name, str) else folder.resolve().name,
        train=_once_a_step([record for record in records if record["kind"] == "train"]),
        evaluations=[record for record in records if record["kind"] == "eval"],
        failures=[record for record in records if record["kind"] == "eval_failed"],
        starts=[record for record in records if record["kind"] == "start"],
        stops=[record for record in records if record["kind"] == "stop"],
        damages=damages,
        saved=saved,
        tree=tree,
        config=config,
        running=held and alive,
        died=held and not alive,
        notes=notes,
    )


def _is_metric(record: Record) -> bool:
    step = number_of(record, "step")
    return isinstance(record.get("kind"), str) and step is not None and step >= 0


def _is_damage(record: Record) -> bool:
    return number_of(record, "step") is not None and isinstance(record.get("reason"), str)


def _lines(path: Path, is_record: Callable[[Record], bool], notes: list[str], *, missing: str = "") -> list[Record]:
    """Return the lines of a JSONL file that are records; notes say how many are not, and why there is none."""
    try:
        lines = read_regular(path).splitlines()
    except FileNotFoundError:
        if missing:
            notes.append(f"{path.name} is not there, {missing}.")
        return []
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {reason_of(error)}.")
        return []
    found, torn = [], 0
    for line in lines:
        try:
            record = load_json(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and is_record(record):
            found.append(record)
        else:
            torn += bool(line.strip())
    if torn:
        notes.append(f"{path.name}: {counted(torn, 'line')} torn or not understood, left out.")
    elif missing and not found:
        notes.append(f"{path.name} is empty, {missing}.")
    return found


def _once_a_step(records: list[Record]) -> list[Record]:
    """Sort records by step; of two of one step the later one counts."""
    by_step = {int(record["step"]): record for record in records}
    return [by_step[step] for step in sorted(by_step)]


def _config(path: Path, notes: list[str]) -> tuple[dict[str, Any], RunConfig | None]:
    try:
        tree = parse_yaml(redact_urls(read_regular(path).decode(errors="replace")), path.name)
    except FileNotFoundError:
        notes.append(f"{path.name} is not there: what was set is not known.")
        return {}, None
    except (OSError, UserError) as error:
        said = reason_of(error) if isinstance(error, OSError) else str(error)
        notes.append(f"{path.name} cannot be read: {said}.")
        return {}, None
    if not isinstance(tree, dict):
        notes.append(f"{path.name} holds no keys.")
        return {}, None
    try:
        return tree, load_config(path)
    except UserError as error:
        notes.append(f"{path.name} is of another version of cosmos-scale ({error}): data and pictures are left out.")
        return tree, None


def _saved(root: Path, notes: list[str]) -> list[SavedCheckpoint]:
    try:
        folders = checkpoints(root)
    except UserError as error:
        notes.append(f"{error}.")
        return []
    found = []
    for folder in folders:
        try:
            manifest = read_manifest(folder)
        except UserError as error:
            notes.append(f"{folder.name}/{MANIFEST} cannot be used: {error}.")
            continue
        state = manifest.state
        written = datetime.fromisoformat(manifest.written).timestamp()
        lost = len(state.lost_shards or {})
        place = SavedCheckpoint(
            folder, state.step, written, state.world_size, lost, manifest.versions, state.steps_per_epoch
        )
        found.append(place)
    return found


def _lock_of(folder: Path) -> tuple[bool, bool]:
    """Return whether a launch has not given the folder back, and whether it has touched its lock of late."""
    try:
        status = (folder / LOCK_FILE).stat()
    except OSError:
        return False, False
    # A touch that lies far ahead is of a dead launch: one that lives has touched it again since the clock was set back.
    return status.st_size > 0, abs(time.time() - status.st_mtime) < DEAD_AFTER
