"""A launched run under observation: its attempts, what its launches print, and every training record that it writes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.checkpoint.state import checkpoints
from cosmos_scale.exit_status import STOPPED
from cosmos_scale.run.folder import CHECKPOINTS, METRICS_FILE
from tools.soak_parts.hosts import HOSTS, Hosts, end_tree, kill
from tools.soak_parts.setting import RUN_NAME

LIMIT = 240.0  # seconds for what follows an event; the machine may be busy
LOOK = 0.05  # seconds between looks
RESTARTS = 10_000  # of a launch

_STARTS = re.compile(r"^cosmos-scale launch: (\d+) ranks? on .*; they meet at ")


class Fault(Exception):
    """What must not happen in a soak; the text says what did."""


class Step(NamedTuple):
    """A training record. attempt: counts the starts of the ranks over all launches. time: seconds since 1970."""

    step: int
    loss: float
    time: float
    attempt: int
    world_size: int


class WatchedRun:
    """The disturbed run: launched again and again, and looked at between."""

    def __init__(self, file: Path, output: Path, hosts: Hosts, logs: Path) -> None:
        """file: the run's. output: the folder of runs. logs: for what the launches print."""
        self.hosts = hosts
        self.folder = output / RUN_NAME
        self.steps: list[Step] = []  # all that were ever told, in the order of their times
        self.said: list[str] = []  # lines of all launches
        self.attempts = 0
        self.world_size = 0
        self.launches = 0
        self._command = launch_command(file, hosts.file(len(HOSTS)), f"output={output}")
        self._logs = logs
        self._process: subprocess.Popen[bytes] | None = None
        self._log = self._metrics = 0  # bytes that were read
        self._inode = 0

    @property
    def launcher(self) -> int:
        """The process of the launch."""
        assert self._process is not None
        return self._process.pid

    @property
    def last(self) -> int:
        """The last step that was told, 0 before the first one."""
        return self.steps[-1].step if self.steps else 0

    def launch(self) -> None:
        """Start a launch; the last one has ended."""
        self.hosts.bring_back()
        self.launches += 1
        self._log = 0
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, env=self.hosts.environment(), stdout=log, stderr=log, start_new_session=True
            )

    def look(self) -> None:
        """Read what the launch has printed and the records that the run has written since the last look."""
        with self._log_file.open("rb") as log:
            log.seek(self._log)
            text = log.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._log += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            self.said.append(line)
            if start := _STARTS.match(line):
                self.attempts += 1
                self.world_size = int(start[1])
        self._read_metrics()

    def wait(self, condition: Callable[[], bool], what: str, *, may_end: bool = False, seconds: float = LIMIT) -> None:
        """Look until a condition is met; raises Fault where it is not met in time, or where the launch ends first."""
        deadline = time.monotonic() + seconds
        while True:
            ended = self.status() is not None  # before the last look
            self.look()
            if condition():
                return
            if ended and not may_end:
                raise Fault(f"the launch ended with status {self.status()}, waited for {what}: {self.said[-1:]}")
            if time.monotonic() > deadline:
                raise Fault(f"waited {seconds:g} s in vain for {what}")
            time.sleep(LOOK)

    def status(self) -> int | None:
        """Return the exit status of the launch, None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def stop(self) -> None:
        """Ask the launch to stop, and wait for it; raises Fault where it ends in another way."""
        kill(self.launcher, signal.SIGTERM)
        self.wait(lambda: self.status() is not None, "the end of the launch", may_end=True)
        self.look()
        if self.status() != STOPPED:
            raise Fault(f"the launch ended with status {self.status()}, not {STOPPED}")

    def end(self) -> None:
        """End the launch and all that it has started, at once."""
        if self._process is None:
            return
        end_tree(self.launcher)
        self._process.wait()

    def checkpoints(self) -> list[Path]:
        """Return the run's checkpoints, the newest last."""
        return checkpoints(self.folder / CHECKPOINTS)

    @property
    def _log_file(self) -> Path:
        return self._logs / f"launch-{self.launches:03d}.log"

    def _read_metrics(self) -> None:
        with suppress(FileNotFoundError), (self.folder / METRICS_FILE).open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:  # written anew at a resume
                self._inode, self._metrics = inode, 0
            file.seek(self._metrics)
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._metrics += len(whole)
            newest = (self.steps[-1].time, self.steps[-1].step) if self.steps else (0.0, 0)
            for line in whole.splitlines():
                record = json.loads(line)
                if record["kind"] == "train" and (record["time"], record["step"]) > newest:
                    told = (record["step"], record["loss"], record["time"], self.attempts, self.world_size)
                    self.steps.append(Step(*told))


def launch_command(file: Path, hosts: Path, *overrides: str) -> list[str]:
    """Return the command of a launch with a short back-off."""
    options = ["--hostfile", str(hosts), "--restarts", str(RESTARTS), "--back-off", "0.5"]
    return [sys.executable, "-m", "cosmos_scale.cli", "launch", *options, str(file), *overrides]


def train_undisturbed(
    file: Path, output: Path, hosts: Hosts, world_sizes: Sequence[tuple[int, int]]
) -> dict[int, float]:
    """Train a run without a disturbance, and return the losses by step.

    world_sizes: numbers of ranks, each with the last step that they take.
    """
    for ranks, last in world_sizes:
        own = [f"output={output}", f"train.max_steps={last}", "checkpoint.every=0"]
        own.append(f"train.micro_batches={len(HOSTS) // ranks}")  # as a launch does that has lost hosts
        output.mkdir(exist_ok=True)
        with (output / "launch.log").open("ab") as log:
            process = subprocess.Popen(
                launch_command(file, hosts.file(ranks), *own),
                env=hosts.environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                status = process.wait(LIMIT + 10.0 * last)
            finally:
                end_tree(process.pid)
                process.wait()
        if status != 0:
            raise Fault(f"the undisturbed run ended with status {status}: {output / 'launch.log'}")
    records = map(json.loads, (output / RUN_NAME / METRICS_FILE).read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}
