"""The records of a run while it trains: metrics.jsonl, TensorBoard, Weights & Biases, console lines, a progress bar."""

import json
import math
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cosmos_scale.config import LogConfig
from cosmos_scale.errors import UserError
from cosmos_scale.files import replace_file

METRICS_FILE = "metrics.jsonl"


class MetricLog:
    """Writes the records of training and evaluation, each with its step; on the main rank only. A context manager."""

    def __init__(
        self, folder: Path, config: LogConfig, *, name: str, run_config: dict[str, Any], first_step: int, last_step: int
    ) -> None:
        """Open all files and services.

        first_step: steps done before. Records of later steps are dropped, since the run takes these steps again.
        Raises UserError where they cannot be dropped.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / METRICS_FILE
        _drop_from(self._path, first_step)
        self._file = self._path.open("a")
        self._tensorboard = _tensorboard(folder, first_step) if config.tensorboard else None
        self._wandb = _wandb(folder, config, name, run_config) if config.wandb else None
        console = Console()
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (config.progress and console.is_terminal),
        )
        self._task = self._progress.add_task("training", total=last_step, completed=first_step, loss="-")

    def __enter__(self) -> "MetricLog":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def advance(self, steps_done: int) -> None:
        """Move the progress bar."""
        self._progress.update(self._task, completed=steps_done)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def training(self, record: dict[str, float]) -> None:
        """Write one training record (its keys are made in `progress.py`) and print its console line."""
        self._progress.update(self._task, loss=f"{record['loss']:.3f}")
        self._write(record, "train")
        self.say(console_line(record))

    def evaluation(self, step: int, results: dict[str, dict[str, float]], table: Table) -> None:
        """Write evaluation results ({model: {metric: value}}) and print their table."""
        flat = {f"{model}/{metric}": value for model, numbers in results.items() for metric, value in numbers.items()}
        self._write({"step": step, **flat}, "eval")
        self._progress.console.print(table)

    def evaluation_failed(self, step: int, name: str, failures: int) -> None:
        """Write how often an evaluator has failed; the record's kind is another than that of results."""
        self._write({"step": step, f"{name}/failures": failures}, "eval_failed")

    def _write(self, record: dict[str, float], prefix: str) -> None:
        step = int(record["step"])
        # JSON has no nan, so that the loss of a skipped step is null.
        written = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self._file.write(json.dumps({"kind": prefix, **written}) + "\n")
        self._file.flush()
        named = {f"{prefix}/{key}": value for key, value in record.items() if key != "step"}
        if self._tensorboard is not None:
            for key, value in named.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(named, step=step)


def console_line(record: dict[str, float]) -> str:
    """Return the numbers of a training record that a person watches, on one line."""
    waited = f"data wait {record['data_wait_min']:.3f}-{record['data_wait_max']:.3f} s"
    if record["data_wait_min"] < record["data_wait_max"]:
        waited += f" (rank {record['data_wait_rank']})"
    return (
        f"step {int(record['step']):6d}  loss {record['loss']:.4f} (clip {record['clip']:.4f} distill "
        f"{record['distill']:.4f})  scale {record['scale']:.2f}/{record['distill_scale']:.2f}  lr {record['lr']:.2e}  "
        f"momentum {record['momentum']:.4f}  grad {record['grad_norm']:.3f}  "
        f"{record['samples_per_second']:.1f} samples/s  step {record['step_seconds_min']:.3f}-"
        f"{record['step_seconds_max']:.3f} s  {waited}"
    )


def _drop_from(path: Path, step: int) -> None:
    """Delete a file's records of steps after `step`, all of them where it is 0, and lines that are torn.

    The file is replaced whole or not at all. Raises UserError where it cannot be written.
    """
    if not path.exists():
        return
    before = path.read_bytes()
    kept = []
    for line in before.splitlines():
        try:
            if json.loads(line)["step"] <= step > 0:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            continue
    after = b"".join(kept)
    if after != before:  # where nothing is to be dropped, a full disk does no harm
        replace_file(path, after)


def _tensorboard(folder: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # here: the import takes a second, and few runs need it

    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)


def _wandb(folder: Path, config: LogConfig, name: str, run_config: dict[str, Any]) -> Any:
    import wandb  # here: the import takes a second, and few runs need it

    assert config.wandb is not None
    identity = folder / "wandb_id"
    if not identity.exists():  # a resumed run continues the same record
        identity.write_text(secrets.token_hex(4))
    mode: Any = config.wandb.mode or os.environ.get("WANDB_MODE")
    try:
        return wandb.init(
            project=config.wandb.project,
            name=name,
            id=identity.read_text(),
            resume="allow",
            dir=str(folder),
            mode=mode,
            config=run_config,
        )
    except wandb.errors.Error as failure:
        said = " ".join(str(failure).split())
        raise UserError(f"log.wandb: {said}; rule: log in, or set log.wandb.mode to offline") from failure
