"""Where records go beside metrics.jsonl: TensorBoard's files and Weights & Biases, under the same names in both.

Both take the run's configuration as hyper-parameters, and with an evaluation's numbers their table and its pictures.
"""

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cosmos_scale.config import LogConfig
from cosmos_scale.errors import UserError
from cosmos_scale.run.tracker_entries import TrackerEntry, read_pictures, table_rows
from cosmos_scale.run.wandb_tracker import WandbTracker, check_seconds, require_login
from cosmos_scale.words import counted

MOST_RECORDS_KEPT = 100_000  # for a place, while it cannot be written

COMPARED_METRICS = ("train/loss", "train/clip", "train/distill", "train/samples_per_second")
"""What TensorBoard shows beside a run's hyper-parameters."""


class Tracker(Protocol):
    """A place for records. `write` and `close` may raise any error, which ends no run: see KeptRecords."""

    name: str
    announcements: list[str]
    """Lines for the run's start."""
    longest_close: float
    """Seconds after which `close` gives up on what does not answer, and returns; 0 where it waits for no process."""

    def write(self, entry: TrackerEntry) -> None:
        """Write what there is of a step."""

    def close(self, *, failed: bool) -> None:
        """Write what is still on its way; failed: whether the run ends with an error."""


class KeptRecords:
    """Hands records to a place; those that it does not take wait in memory. A failure is said once, and its end."""

    def __init__(self, tracker: Tracker, say: Callable[[str], None]) -> None:
        self._tracker, self._say = tracker, say
        self._waiting: deque[TrackerEntry] = deque(maxlen=MOST_RECORDS_KEPT)
        self._failing = False

    def write(self, entry: TrackerEntry) -> None:
        """Write what there is of a step, after what waits."""
        self._waiting.append(entry)
        try:
            self._write_waiting()
        except Exception as failure:
            if not self._failing:
                self._failing = True
                self._say(f"{self._tracker.name}: {_in_one_line(failure)}; its records are kept, and the run goes on")
            return
        if self._failing:
            self._failing = False
            self._say(f"{self._tracker.name}: takes records again")

    @property
    def longest_close(self) -> float:
        """Seconds that `close` may take where a library's process does not answer."""
        return self._tracker.longest_close

    def close(self, *, failed: bool) -> None:
        """Close the place, after a last try with what waits; failed: whether the run ends with an error."""
        with suppress(Exception):  # told already
            self._write_waiting()
        said = []
        try:
            self._tracker.close(failed=failed)
        except Exception as failure:
            said.append(f"cannot be closed: {_in_one_line(failure)}")
        if self._waiting:
            records = counted(len(self._waiting), "record is", "records are")
            said.append(f"{records} missing there, which metrics.jsonl has")
        if said:
            self._say(f"{self._tracker.name}: {'; '.join(said)}")

    def _write_waiting(self) -> None:
        while self._waiting:
            self._tracker.write(self._waiting[0])
            self._waiting.popleft()


def check_trackers(config: LogConfig) -> None:
    """Raise UserError where the config names a place that cannot be opened here; nothing is written or sent."""
    for key, package, wanted in (
        ("log.tensorboard", "tensorboard", config.tensorboard),
        ("log.wandb", "wandb", config.wandb is not None),
    ):
        if wanted and find_spec(package) is None:
            raise UserError(f"{key}: the package {package} is not installed; rule: install it, or leave {key} out")
    if config.wandb is not None:
        check_seconds()
        require_login(config.wandb)


def open_trackers(
    folder: Path,
    config: LogConfig,
    *,
    name: str,
    run_config: Mapping[str, Any],
    first_step: int,
    logged: Iterable[TrackerEntry] = (),
) -> list[Tracker]:
    """Open the places that the config names; raises UserError where one cannot be opened.

    logged: what the run has logged up to its first step, for a place that begins anew.
    """
    trackers: list[Tracker] = []
    try:
        if config.tensorboard:
            trackers.append(_TensorBoard(folder / "tensorboard", first_step, run_config))
        if config.wandb is not None:
            trackers.append(WandbTracker(folder, config.wandb, name, run_config, logged))
    except ImportError as failure:
        raise UserError(f"log: {failure}; rule: mend the installation, or leave the key out") from failure
    except OSError as failure:
        place = os.fsdecode(failure.filename or folder)  # TensorBoard names its files by bytes
        raise UserError(f"log: {place}: cannot be written: {failure.strerror}") from failure
    return trackers


class _TensorBoard:
    name = "log.tensorboard"
    longest_close = 0.0

    def __init__(self, folder: Path, first_step: int, run_config: Mapping[str, Any]) -> None:
        self.announcements: list[str] = []
        self._folder = folder
        self._show_error = threading.excepthook
        threading.excepthook = self._note_thread
        self._writer: Any = self._open(first_step + 1)
        self._end = self._write_config(run_config, first_step)

    def write(self, entry: TrackerEntry) -> None:
        if self._writer is None:
            self._writer = self._open(None)
        try:
            for key, value in entry.numbers.items():
                self._writer.add_scalar(key, value, entry.step)
            for key, results in entry.tables.items():
                self._writer.add_text(key, _markdown(*table_rows(results)), entry.step)
            for key, picture in read_pictures(entry).items():
                self._writer.add_image(key, np.asarray(picture), entry.step, dataformats="HWC")
            self._writer.flush()
        except OSError:
            self._writer = None  # its thread has ended; another file takes the next record
            raise

    def close(self, *, failed: bool) -> None:
        threading.excepthook = self._show_error
        if self._writer is not None:
            if not failed:
                self._writer.file_writer.add_summary(self._end)
            self._writer.close()

    def _write_config(self, run_config: Mapping[str, Any], first_step: int) -> Any:
        """Write the configuration, as hyper-parameters and as text; return what says that the run ended well."""
        from torch.utils.tensorboard.summary import hparams

        flat = flattened(run_config)
        experiment, start, end = hparams(flat, dict.fromkeys(COMPARED_METRICS, 0.0))
        for summary in (experiment, start):
            self._writer.file_writer.add_summary(summary)
        self._writer.add_text("config", _markdown(["key", "value"], list(flat.items())), first_step)
        self._writer.flush()
        return end

    def _note_thread(self, end: threading.ExceptHookArgs) -> None:
        """Show no traceback of the library's thread: `write` raises its error."""
        if not type(end.thread).__module__.startswith("tensorboard"):
            self._show_error(end)

    def _open(self, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # here: the import takes a second, and few runs need it

        return SummaryWriter(str(self._folder), purge_step=purge_step)


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return a configuration's values by dotted key; lists and null as JSON."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [
        heads,
        ["---"] * len(heads),
        *([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows),
    ]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _in_one_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())}"
