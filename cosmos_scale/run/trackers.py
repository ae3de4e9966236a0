"""Where records go beside metrics.jsonl: TensorBoard's files and Weights & Biases."""

import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from cosmos_scale.config import LogConfig, WandbConfig
from cosmos_scale.errors import UserError

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

        identity = folder / "wandb_id"
        if not identity.exists():  # a resumed run continues the same record
            identity.write_text(secrets.token_hex(4))
        mode: Any = config.mode or os.environ.get("WANDB_MODE")
        # The library takes some 30 lines to tell where an offline run lies; `announcement` takes one.
        settings = wandb.Settings(silent=True) if mode == "offline" else wandb.Settings(quiet=True)
        try:
            self._run = wandb.init(
                project=config.project,
                name=name,
                id=identity.read_text(),
                resume="allow",
                dir=str(folder),
                mode=mode,
                config=dict(run_config),
                settings=settings,
            )
        except wandb.errors.Error as failure:
            said = " ".join(str(failure).split())
            raise UserError(f"log.wandb: {said}; rule: log in, or set log.wandb.mode to offline") from failure
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


def _in_one_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())}"
