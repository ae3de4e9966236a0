"""Where records go beside metrics.jsonl: TensorBoard's files and Weights & Biases."""

import os
import re
import secrets
import threading
from collections import deque
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from cosmos_scale.config import LogConfig, WandbConfig
from cosmos_scale.errors import UserError
from cosmos_scale.files import read_regular, whole_file
from cosmos_scale.run.folder import WANDB_ID

WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
MOST_RECORDS_KEPT = 100_000  # for a place, while it cannot be written


class Tracker(Protocol):
    """A place for records. `write` and `close` may raise any error, which ends no run: see KeptRecords."""

    name: str
    announcement: str
    """A line for the run's start, or nothing."""

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Write the numbers of a step by their names."""

    def close(self, *, failed: bool) -> None:
        """Write what is still on its way; failed: whether the run ends with an error."""


class KeptRecords:
    """Hands records to a place; those that it does not take wait in memory. A failure is said once, and its end."""

    def __init__(self, tracker: Tracker, say: Callable[[str], None]) -> None:
        self._tracker, self._say = tracker, say
        self._waiting: deque[tuple[Mapping[str, float], int]] = deque(maxlen=MOST_RECORDS_KEPT)
        self._failing = False

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Write the numbers of a step by their names, after those that wait."""
        self._waiting.append((numbers, step))
        try:
            while self._waiting:
                self._tracker.write(*self._waiting[0])
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
            trackers.append(_TensorBoard(folder / "tensorboard", first_step))
        if config.wandb is not None:
            trackers.append(_Wandb(folder, config.wandb, name, run_config))
    except ImportError as failure:
        raise UserError(f"log: {failure}; rule: mend the installation, or leave the key out") from failure
    except OSError as failure:
        raise UserError(f"log: {failure.filename or folder}: cannot be written: {failure.strerror}") from failure
    return trackers


class _TensorBoard:
    name = "log.tensorboard"
    announcement = ""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder = folder
        self._show_error = threading.excepthook
        threading.excepthook = self._note_thread
        self._writer: Any = self._open(first_step + 1)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            self._writer = self._open(None)
        try:
            for key, value in numbers.items():
                self._writer.add_scalar(key, value, step)
            self._writer.flush()
        except OSError:
            self._writer = None  # its thread has ended; another file takes the next record
            raise

    def close(self, *, failed: bool) -> None:
        threading.excepthook = self._show_error
        if self._writer is not None:
            self._writer.close()

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
        self._teardown = wandb.teardown
        # The library's own step only grows. It would drop what a run writes that goes back to an earlier checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.announcement = ""
        if mode == "offline":
            self.announcement = f"{self.name}: offline; to send it: wandb sync {Path(self._run.dir).parent}"

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log({"step": step, **numbers})

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


def _in_one_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())}"
