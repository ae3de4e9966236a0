"""Where records go beside metrics.jsonl: TensorBoard's files and Weights & Biases, under the same names in both.

Both take the run's configuration as hyper-parameters, and with an evaluation's numbers their table and its pictures.
"""

import json
import os
import re
import secrets
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from cosmos_scale.config import LogConfig, WandbConfig
from cosmos_scale.errors import UserError
from cosmos_scale.files import read_regular, regular_only, whole_file
from cosmos_scale.run.folder import WANDB_ID

WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
MOST_RECORDS_KEPT = 100_000  # for a place, while it cannot be written


PICTURES = {".png", ".jpg", ".jpeg"}
MOST_PICTURES = 8  # of a model in one evaluation
LARGEST_PICTURE = 1024  # pixels of its longer side; larger ones are made smaller
COMPARED_METRICS = ("train/loss", "train/clip", "train/distill", "train/samples_per_second")
"""What TensorBoard shows beside a run's hyper-parameters."""

EvaluationTable = Mapping[str, Mapping[str, float]]
"""What an evaluator measured: {model: {metric: value}}."""


class TrackerEntry(NamedTuple):
    """What is written of a step: numbers, tables of results and files with pictures, each by its name."""

    step: int
    numbers: Mapping[str, float]
    tables: Mapping[str, EvaluationTable]
    pictures: Mapping[str, Path]


class Tracker(Protocol):
    """A place for records. `write` and `close` may raise any error, which ends no run: see KeptRecords."""

    name: str
    announcement: str
    """A line for the run's start, or nothing."""

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
            while self._waiting:
                self._tracker.write(self._waiting[0])
                self._waiting.popleft()
        except Exception as failure:
            if not self._failing:
                self._failing = True
                self._say(f"{self._tracker.name}: {_in_one_line(failure)}; its records are kept, and the run goes on")
            return
        if self._failing:
            self._failing = False
            self._say(f"{self._tracker.name}: takes records again")

    def close(self, *, failed: bool) -> None:
        """Close the place; failed: whether the run ends with an error."""
        try:
            self._tracker.close(failed=failed)
        except Exception as failure:
            self._say(f"{self._tracker.name}: cannot be closed: {_in_one_line(failure)}")


def check_trackers(config: LogConfig) -> None:
    """Raise UserError where the config names a place that cannot be opened here; nothing is imported or sent."""
    for key, package, wanted in (
        ("log.tensorboard", "tensorboard", config.tensorboard),
        ("log.wandb", "wandb", config.wandb is not None),
    ):
        if wanted and find_spec(package) is None:
            raise UserError(f"{key}: the package {package} is not installed; rule: install it, or leave {key} out")
    if config.wandb is not None:
        _mode_of(config.wandb)


def open_trackers(
    folder: Path, config: LogConfig, *, name: str, run_config: Mapping[str, Any], first_step: int
) -> list[Tracker]:
    """Open the places that the config names; raises UserError where one cannot be opened."""
    trackers: list[Tracker] = []
    try:
        if config.tensorboard:
            trackers.append(_TensorBoard(folder / "tensorboard", first_step, run_config))
        if config.wandb is not None:
            trackers.append(_Wandb(folder, config.wandb, name, run_config))
    except ImportError as failure:
        raise UserError(f"log: {failure}; rule: mend the installation, or leave the key out") from failure
    except OSError as failure:
        place = os.fsdecode(failure.filename or folder)  # TensorBoard names its files by bytes
        raise UserError(f"log: {place}: cannot be written: {failure.strerror}") from failure
    return trackers


class _TensorBoard:
    name = "log.tensorboard"
    announcement = ""

    def __init__(self, folder: Path, first_step: int, run_config: Mapping[str, Any]) -> None:
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
                self._writer.add_text(key, _markdown(*_rows(results)), entry.step)
            for key, picture in _read_pictures(entry).items():
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


class _Wandb:
    name = "log.wandb"

    def __init__(self, folder: Path, config: WandbConfig, name: str, run_config: Mapping[str, Any]) -> None:
        import wandb  # here: the import takes a second, and few runs need it

        identity = record_name(folder / WANDB_ID)
        mode: Any = _mode_of(config)
        # The library takes some 30 lines to tell where an offline run lies; `announcement` takes one.
        try:
            settings = wandb.Settings(silent=True) if mode == "offline" else wandb.Settings(quiet=True)
            self._run = wandb.init(
                project=config.project,
                name=name,
                id=identity,
                resume="allow",
                dir=str(folder),
                mode=mode,
                config=dict(run_config),
                settings=settings,
            )
        except Exception as failure:  # any: the library reads the environment and the network
            said = " ".join(str(failure).split())
            raise UserError(f"log.wandb: {said}; rule: log in, or set log.wandb.mode to offline") from failure
        self._teardown, self._table, self._image = wandb.teardown, wandb.Table, wandb.Image
        # The library's own step only grows. It would drop what a run writes that goes back to an earlier checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.announcement = ""
        if mode == "offline":
            self.announcement = f"{self.name}: offline; to send it: wandb sync {Path(self._run.dir).parent}"

    def write(self, entry: TrackerEntry) -> None:
        tables = {}
        for key, results in entry.tables.items():
            heads, rows = _rows(results)
            tables[key] = self._table(columns=[*heads], data=[list(row) for row in rows], allow_mixed_types=True)
        pictures = {key: self._image(picture) for key, picture in _read_pictures(entry).items()}
        self._run.log({"step": entry.step, **entry.numbers, **tables, **pictures})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)
        # The library's own process may still write its file: `finish` does not wait for that, and a run leaves at once.
        self._teardown()


def _mode_of(config: WandbConfig) -> str | None:
    """Return the mode that the config names, or else the environment; raises UserError where there is no such mode."""
    environment = os.environ.get("WANDB_MODE")
    if environment is not None and environment not in WANDB_MODES:  # the library refuses it whatever the config says
        raise UserError(f"WANDB_MODE: {environment!r}; rule: one of {', '.join(WANDB_MODES)}, or unset")
    return config.mode or environment


def record_name(path: Path) -> str:
    """Return the name of the run's record, which a resumed run continues; a new one where the file holds none."""
    identity = read_regular(path).decode(errors="replace").strip() if path.exists() else ""
    if not re.fullmatch(r"[\w-]+", identity, re.ASCII):  # none yet, or torn
        identity = secrets.token_hex(4)
        with whole_file(path) as part:
            part.write_text(identity)
    return identity


def pictures_in(folder: Path) -> list[Path]:
    """Return the first pictures of a folder by their names, MOST_PICTURES at most; none where there is no folder."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)[:MOST_PICTURES]
    except OSError:
        return []


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return a configuration's values by dotted key; lists and null as JSON."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat


def _read_pictures(entry: TrackerEntry) -> dict[str, Image.Image]:
    """Return an entry's pictures, none over LARGEST_PICTURE; those that are not there any more are left out."""
    found = {}
    for key, path in entry.pictures.items():
        with suppress(OSError), open(path, "rb", opener=regular_only) as file:  # of PIL's errors too
            picture = Image.open(file).convert("RGB")
            picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
            found[key] = picture
    return found


def _rows(results: EvaluationTable) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return the heads and the rows of a table: a row a metric, a column a model."""
    metrics = dict.fromkeys(metric for numbers in results.values() for metric in numbers)
    rows = [(metric, *(numbers.get(metric) for numbers in results.values())) for metric in metrics]
    return ["metric", *results], rows


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
