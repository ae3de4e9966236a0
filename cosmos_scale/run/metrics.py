"""The records of a run while it trains: metrics.jsonl, TensorBoard, Weights & Biases, console lines, a progress bar."""

import json
import math
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cosmos_scale.config import LogConfig
from cosmos_scale.console import make_console
from cosmos_scale.files import make_folder
from cosmos_scale.line_file import LineFile
from cosmos_scale.run.folder import METRICS_FILE
from cosmos_scale.run.logged import cut_after, evaluator_of, records_of, tracked_entries
from cosmos_scale.run.tracker_entries import EvaluationTable, TrackerEntry, named_pictures
from cosmos_scale.run.trackers import KeptRecords, open_trackers
from cosmos_scale.run.wandb_tracker import supersede
from cosmos_scale.versions import code_facts
from cosmos_scale.words import counted


class MetricLog:
    """Writes the records of training and evaluation, each with its step; on the main rank only. A context manager.

    Nothing that it writes to ends the run: what fails is told once, and tried again with each record.
    """

    def __init__(
        self,
        folder: Path,
        config: LogConfig,
        *,
        name: str,
        run_config: Mapping[str, Any],
        first_step: int,
        last_step: int,
        steps_per_epoch: int,
    ) -> None:
        """Open all files and services.

        first_step: steps done before. Records of later steps are dropped, since the run takes these steps again.
        Raises UserError where they cannot be dropped, or where a file or service cannot be opened.
        """
        self._first_step, self._last_step, self._steps_per_epoch = first_step, last_step, steps_per_epoch
        make_folder(folder)
        cut = cut_after(folder / METRICS_FILE, first_step)
        if cut.tracked:
            supersede(folder)
        copy = cut.make()
        self._file = LineFile(folder / METRICS_FILE, alone=True)
        logged = tracked_entries(folder)
        trackers = open_trackers(folder, config, name=name, run_config=run_config, first_step=first_step, logged=logged)
        self._announcements = [line for tracker in trackers for line in tracker.announcements]
        if cut.lines:
            lines = counted(cut.lines, "line")
            self._announcements.append(f"{METRICS_FILE}: dropped {lines} of steps after {first_step}, taken anew now")
        if copy is not None:
            lines = counted(cut.foreign, "line that is no record", "lines that are no records")
            self._announcements.append(f"{METRICS_FILE}: took out {lines}; the file of before is kept as {copy.name}")
        self._trackers = [KeptRecords(tracker, self.say) for tracker in trackers]
        console = make_console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (config.progress and console.is_terminal),
        )
        self._task = self._progress.add_task("training", total=last_step, completed=first_step, loss="loss -")
        self._work = self._progress.add_task("", total=None, visible=False, loss="")
        self._started = time.monotonic()

    def __enter__(self) -> "MetricLog":
        self._progress.start()
        for line in self._announcements:
            self.say(line)
        self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._file.close()
        for tracker in self._trackers:
            tracker.close(failed=error is not None)

    @property
    def longest_end(self) -> float:
        """Seconds that the end of the records may take where the library of a place does not answer."""
        return sum(tracker.longest_close for tracker in self._trackers)

    def advance(self, steps_done: int) -> None:
        """Move the progress bar."""
        self._progress.update(self._task, completed=steps_done)

    def working(self, work: str, done: int, total: int) -> None:
        """Show a second bar below that of the training: how far other work is, such as an evaluation."""
        if self._progress.tasks[self._work].description != work:
            self._progress.reset(self._work, total=total, description=work, visible=True)
        self._progress.update(self._work, completed=done, total=total)

    def worked(self) -> None:
        """Take the second bar away."""
        self._progress.update(self._work, description="", visible=False)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self._progress.console.print(text, highlight=False, soft_wrap=True)

    def started(self, world_size: int, device: str) -> None:
        """Write that a launch has started, with its first step and its code; trackers have no place for that."""
        facts = {"step": self._first_step, "world_size": world_size, "device": device, **code_facts()}
        self._file.append([json.dumps({"kind": "start", "time": round(time.time(), 3), **facts})])

    def stopped(self, step: int, reason: str, goodput: Mapping[str, float]) -> None:
        """Write after which step the run was asked to stop, and by what, such as a signal; not to trackers."""
        entry = {"kind": "stop", "time": round(time.time(), 3), "step": step, "reason": reason, **goodput}
        self._file.append([json.dumps(entry)])

    def training(self, record: dict[str, float]) -> None:
        """Write one training record (its keys are made in `progress.py`) and print its console line."""
        self._progress.update(self._task, loss=f"loss {record['loss']:.3f}")
        done = int(record["step"])
        left = (time.monotonic() - self._started) / max(1, done - self._first_step) * (self._last_step - done)
        self._write(record | {"eta_seconds": left}, "train")
        self.say(
            f"step {done:>6}/{self._last_step} epoch {done / self._steps_per_epoch:.1f} eta {span(left)}  "
            f"{console_line(record)}  {datetime.now():%H:%M:%S}"
        )

    def evaluation(
        self,
        step: int,
        name: str,
        results: dict[str, dict[str, float]],
        table: Table,
        folders: Mapping[str, Path] | None = None,
    ) -> None:
        """Write the results of an evaluator of this name ({model: {metric: value}}) and print their table.

        folders: by model, where the evaluator may have left pictures, which go to the trackers with the results.
        """
        flat = {f"{model}/{metric}": value for model, numbers in results.items() for metric, value in numbers.items()}
        tables = {f"eval/{name}/table": results} if results else {}
        self._write({"step": step, **flat}, "eval", {"evaluator": name}, tables, named_pictures(folders or {}))
        self._progress.console.print(table)

    def evaluated_at(self, step: int) -> dict[str, bool]:
        """Return the evaluators that have a record of a step, by name: whether one is of numbers, or none."""
        found: dict[str, bool] = {}
        for entry in records_of(self._file.path):
            if entry.get("kind") in ("eval", "eval_failed") and entry.get("step") == step:
                name = evaluator_of(entry)
                found[name] = found.get(name, False) or entry["kind"] == "eval"
        return found

    def evaluation_failed(self, step: int, name: str, failures: int) -> None:
        """Write how often an evaluator has failed; the record's kind is another than that of results."""
        self._write({"step": step, f"{name}/failures": failures}, "eval_failed", {"evaluator": name})

    def _write(
        self,
        record: dict[str, float],
        prefix: str,
        names: Mapping[str, str] | None = None,
        tables: Mapping[str, EvaluationTable] | None = None,
        pictures: Mapping[str, Path] | None = None,
    ) -> None:
        step = int(record["step"])
        # JSON has no nan, so that the loss of a skipped step is null.
        written = {key: value if math.isfinite(value) else None for key, value in record.items()}
        now = round(time.time(), 3)  # seconds since 1970, UTC
        entry = {"kind": prefix, "time": now, **(names or {}), **written}
        self._file.append([json.dumps(entry)])
        named = {f"{prefix}/{key}": value for key, value in record.items() if key != "step"}
        for tracker in self._trackers:
            tracker.write(TrackerEntry(step, now, named, tables or {}, pictures or {}))


def console_line(record: Mapping[str, float]) -> str:
    """Return the numbers of a training record that a person watches: a line of how it learns and one of how fast.

    With its place in the run and the time no line has over 120 columns. TFLOP/s: of a rank. GiB: the most memory of a
    rank, see `peak_memory`. wait: for data, of the rank that waited longest.
    """
    waited = f"wait {_rounded(record['data_wait_max'])} s"
    if record["data_wait_min"] < record["data_wait_max"]:
        waited += f" (rank {record['data_wait_rank']})"
    share = "MFU n/a"
    if "mfu" in record:
        share = f"MFU {100 * record['mfu']:.1f} % HFU {100 * record['hfu']:.1f} %"
    return (
        f"loss {record['loss']:.4g} (clip {record['clip']:.4g} distill {record['distill']:.4g})  "
        f"scale {record['scale']:.3g}/{record['distill_scale']:.3g} lr {record['lr']:.1e} "
        f"grad {record['grad_norm']:.3g}\n"
        f"  {_rounded(record['samples_per_second'])} samples/s "
        f"({_rounded(record['samples_per_second_per_rank'])} a rank)  {_rate(record['tflops_per_rank'])}  "
        f"{share}  {record['peak_memory_gib']:.1f} GiB  {waited}"
    )


def _rate(teraflops: float) -> str:
    """Return a rate of operations in a unit in which it has digits: of a CPU or a tiny model in GFLOP/s."""
    return f"{teraflops:.3g} TFLOP/s" if teraflops >= 0.1 else f"{1e3 * teraflops:.3g} GFLOP/s"


def _rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def span(seconds: float) -> str:
    """Return a time to wait in its two largest units, such as 3d12h or 4m05s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
