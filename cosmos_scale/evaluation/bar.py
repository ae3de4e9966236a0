"""A progress bar of what an evaluation reports, on stderr."""

import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cosmos_scale.console import make_console

_SECONDS = 0.1  # between drawings


class WorkBar(AbstractContextManager["WorkBar"]):
    """Draws what `report` is told, a bar for each kind of work, where `show` is true and stderr is a terminal."""

    def __init__(self, *, show: bool) -> None:
        self._shown = show and sys.stderr.isatty()
        self._drawn = 0.0
        self._work = ""
        # Drawn at each report, not by a thread: an evaluator may fork workers while the bar stands.
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=make_console(stderr=True),
            disable=not self._shown,
            auto_refresh=False,
            transient=True,
        )

    def __enter__(self) -> "WorkBar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def report(self, work: str, done: int, total: int) -> None:
        """Draw how much of some work is done; work of another name than before has a new bar."""
        if work != self._work or not self._progress.tasks:
            self._work = work
            for task in self._progress.task_ids:
                self._progress.remove_task(task)
            self._progress.add_task(work, total=total)
        self._progress.update(self._progress.task_ids[0], completed=done, total=total)
        now = time.monotonic()
        if done >= total or now - self._drawn >= _SECONDS:
            self._drawn = now
            self._progress.refresh()
