"""Supervision of a launch: attempts until the run is finished or stopped, or until no restart can cure it."""

import json
import re
import select
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.config import RunConfig
from cosmos_scale.errors import UserError
from cosmos_scale.exit_status import FAILED, FINISHED, INTERRUPTED, REFUSED, STOPPED
from cosmos_scale.files import regular_only
from cosmos_scale.host import python_command
from cosmos_scale.launch.attempt import Attempt, HostRanks, Job, Outcome, RankFailure
from cosmos_scale.launch.connection import passed_environment
from cosmos_scale.launch.fit import (
    first_world_size,
    fit_ranks,
    place_ranks,
    remember_micro_batch,
    remembered_micro_batch,
    slots_of,
)
from cosmos_scale.launch.hostfile import Host
from cosmos_scale.launch.printer import Printer
from cosmos_scale.launch.signals import StoppedEarly, StopSignals
from cosmos_scale.run.folder import CHECKPOINTS, METRICS_FILE
from cosmos_scale.words import counted

LOGS = "logs"  # in the run's folder: what each rank printed
LONGEST_BACK_OFF = 300.0  # seconds
MOST_DOUBLINGS = 30  # of the back-off
_TAIL = 1 << 16  # bytes of metrics.jsonl that are looked at


@dataclass(frozen=True)
class LaunchedRun:
    """The run to launch, and how. link_limit, stop_limit: see Job.

    program: the module that each rank runs. options: what its command line has behind file and keys. logs: the folder
    of the ranks' output; by default `logs` in the run's folder. at_stop: what its ranks do when they are asked to stop.
    restarts: how many at most until a further checkpoint is written. back_off: seconds before a restart, twice as many
    before each one that follows without a further step.
    least_ranks: fewer ranks than that are not started.
    """

    file: str
    overrides: tuple[str, ...]
    config: RunConfig
    program: str = "cosmos_scale.train"
    options: tuple[str, ...] = ()
    logs: Path | None = None
    at_stop: str = "stop after their step and save a checkpoint"
    restarts: int = 3
    back_off: float = 5.0
    least_ranks: int = 1
    link_limit: float = 300.0
    stop_limit: float | None = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return (self.config.output / self.config.name).absolute()


class Meeting(NamedTuple):
    """Where the ranks of the next attempt meet. hosts: those that answer. interfaces: by host, see `place_ranks`."""

    hosts: list[Host]
    address: str
    port: int
    interfaces: dict[str, dict[str, str]]


class Supervisor:
    """Starts the ranks of a run, again and again where that may help, and says why it does not."""

    def __init__(
        self,
        run: LaunchedRun,
        hosts: Sequence[Host],
        look: Callable[[Sequence[Host], bool], Meeting],
        printer: Printer,
        stop: StopSignals,
    ) -> None:
        """look: looks at hosts before an attempt; told whether it is the first one, of which every host must be fit."""
        self._run, self._hosts, self._look = run, list(hosts), look
        self._printer, self._stop = printer, stop
        self._started_with = first_world_size(run.config, slots_of(hosts))
        self._known = self._known_micro_batch()
        # Samples of a micro-batch, at most.
        self._most = self._known or run.config.samples_per_rank(self._started_with) // run.config.train.micro_batches
        self._last: tuple[int, str] | None = None  # the step and the way of the last failure
        self._in_a_row = 0  # restarts since a further step was done
        self._restarts = 0  # since a further checkpoint was written
        self._found = self._newest_step()  # the step of the newest checkpoint before this launch
        self._saved = self._found  # the step of the newest checkpoint there ever was

    def run(self) -> int:
        """Launch until the end; returns the launch's exit status. Raises UserError where the first look refuses."""
        number = 0
        while True:
            if number and not self._wait():
                return self._stopped_status(False)
            before = self._reached()
            try:
                meeting = self._look(self._hosts, number == 0)
                outcome = self._attempt(number, meeting)
            except StoppedEarly:
                return self._stopped_status(False)
            except UserError as error:
                if number == 0:
                    raise
                self._printer.say(f"restart {self._restarts}: {error}")
            else:
                ended = self._judge(outcome, before)
                if ended is not None:
                    return ended
                self._note_progress(before)
            if self._restarts == self._run.restarts:
                self._printer.say(f"{counted(self._run.restarts, 'restart')} did not help; {self._newest()}")
                return FAILED
            number += 1
            self._restarts += 1

    def _note_progress(self, before: int) -> None:
        """Let a further step end the growth of the back-off, and a further checkpoint the count of restarts."""
        if self._reached() > before:
            self._in_a_row = 0
        if self._newest_step() > self._saved:
            self._saved = self._newest_step()
            self._restarts = 0

    def _attempt(self, number: int, meeting: Meeting) -> Outcome:
        run = self._run
        fit = fit_ranks(run.config, slots_of(meeting.hosts), self._most, run.least_ranks)
        places, idle = place_ranks(meeting.hosts, fit.world_size, meeting.interfaces)
        if number == 0:
            remember_micro_batch(run.config, self._most, run.folder)
        own = (
            () if fit.micro_batches == run.config.train.micro_batches else (f"train.micro_batches={fit.micro_batches}",)
        )
        if idle or fit.world_size != self._started_with:
            all_ranks = self._started_with if number else slots_of(meeting.hosts)
            self._printer.say(
                f"{fit.world_size} of {all_ranks} ranks {'go on' if number else 'train'}, the global batch stays "
                f"{run.config.train.global_batch} ({counted(fit.micro_batches, 'micro-batch', 'micro-batches')} a rank)"
                f"{'; idle: ' if idle else ''}{', '.join(idle)}"
            )
        if own and self._known is not None and number == 0:
            self._printer.say(
                f"{own[0]} in the place of {run.config.train.micro_batches}, so that a micro-batch has no more samples "
                f"than in earlier launches ({self._known}); the key on the command line is taken as it is"
            )
        if run.config.resume != "auto" and self._newest_step() > self._found:
            # The named checkpoint, or `never`, was for the first start: the run has checkpoints of its own by now.
            own = (*own, "resume=auto")
        with_own = replace(run, overrides=(*run.overrides, *own))
        return one_attempt(with_own, meeting, places, number + 1, self._printer, self._stop)

    def _judge(self, outcome: Outcome, before: int) -> int | None:
        """Return the launch's exit status after an attempt, None where a restart may help; says why."""
        failure, reached = outcome.failure, self._reached()
        if self._stop.at_once:
            self._printer.say(f"ended at once; {self._newest()}")
            return INTERRUPTED
        if failure is None:
            return self._stopped_status(True)
        if self._stop.first is not None:
            if reached > before:
                self._printer.say(f"the stop did not end well: {failure}; {self._newest()}")
                return FAILED
            return self._stopped_status(False)
        # Another program may take the port between the look and the start; then the next start has another one.
        if failure.status == REFUSED and reached <= before and "MASTER_PORT: " not in failure.text:
            self._printer.say(f"{failure}: a restart will not cure this")
            return REFUSED
        way = (reached, _way(failure))
        if way == self._last and not _is_of_outside(failure):
            self._printer.say(
                f"{failure}, as before, after step {reached}: a restart will not cure this; {self._newest()}"
            )
            return REFUSED
        self._last = way
        return None

    def _known_micro_batch(self) -> int | None:
        """Return the samples of a micro-batch with which earlier launches have trained, None where others are asked."""
        asked = any(word.startswith("train.micro_batches=") for word in self._run.overrides)
        return None if asked or not self._reached() else remembered_micro_batch(self._run.config, self._run.folder)

    def _wait(self) -> bool:
        """Wait before a restart; returns False where a signal ends the wait."""
        seconds = min(LONGEST_BACK_OFF, self._run.back_off * 2.0 ** min(self._in_a_row, MOST_DOUBLINGS))
        self._in_a_row += 1
        self._printer.say(f"restart {self._restarts} of {self._run.restarts} in {seconds:g} s; {self._newest()}")
        deadline = time.monotonic() + seconds
        while self._stop.first is None and (left := deadline - time.monotonic()) > 0:
            select.select([self._stop.wakes], [], [], left)
        return self._stop.first is None

    def _stopped_status(self, saved: bool) -> int:
        """Return STOPPED where steps are left to do, else FINISHED; says so. saved: whether the ranks ended well."""
        done = self._done()
        unknown = self._stop.first is None and self._reached() > 0  # whether it is finished where no checkpoint tells
        if saved and (unknown if done is None else done[0] >= done[1]):
            self._printer.say("finished")
            return FINISHED
        if saved and done is not None:
            self._printer.say(f"stopped after step {done[0]} of {done[1]}; {self._newest()}")
        else:
            self._printer.say(f"stopped before a step was done; {self._newest()}")
        return STOPPED

    def _done(self) -> tuple[int, int] | None:
        """Return the step of the newest checkpoint and the run's last step; None where that cannot be told."""
        if not self._any_checkpoint():
            return None
        from cosmos_scale.checkpoint.state import newest, read_state  # here, since the import takes seconds

        with suppress(UserError):
            found = newest(self._run.folder / CHECKPOINTS)
            if found is not None:
                state = read_state(found)
                if state.steps_per_epoch is not None or self._run.config.train.schedule_steps is not None:
                    return state.step, self._run.config.last_step(state.steps_per_epoch or 0)
        return None

    def _any_checkpoint(self) -> bool:
        return any((self._run.folder / CHECKPOINTS).glob("step-*"))

    def _newest_step(self) -> int:
        """Return the step of the newest checkpoint by the folders' names, -1 where there is none."""
        names = (folder.name.removeprefix("step-") for folder in (self._run.folder / CHECKPOINTS).glob("step-*"))
        return max((int(name) for name in names if name.isdecimal()), default=-1)

    def _newest(self) -> str:
        if not self._any_checkpoint():
            return "newest checkpoint: none"
        from cosmos_scale.checkpoint.state import newest

        try:
            return f"newest checkpoint: {newest(self._run.folder / CHECKPOINTS) or 'none'}"
        except UserError as error:
            return f"newest checkpoint: {error}"

    def _reached(self) -> int:
        """Return the last step that metrics.jsonl has, 0 where it has none."""
        try:
            with open(self._run.folder / METRICS_FILE, "rb", opener=regular_only) as file:
                file.seek(max(0, file.seek(0, 2) - _TAIL))
                lines = file.read().split(b"\n")[:-1]
        except OSError:
            return 0
        for line in reversed(lines):
            with suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                if record["kind"] == "train":
                    return int(record["step"])
        return 0


def one_attempt(
    run: LaunchedRun,
    meeting: Meeting,
    places: Sequence[HostRanks],
    number: int,
    printer: Printer,
    stop: StopSignals,
) -> Outcome:
    """Start the run's program on all places, and follow it to its end; number: of the start, from 1."""
    command = (*python_command(run.program), run.file, *run.overrides, *run.options)
    environment = passed_environment() | {"MASTER_ADDR": meeting.address, "MASTER_PORT": str(meeting.port)}
    logs = (run.logs or run.folder / LOGS).absolute()
    job = Job(command, Path.cwd(), environment, logs, run.link_limit, run.stop_limit)
    where = ", ".join(f"{place.host.name} ({len(place.ranks)})" for place in places)
    interfaces = sorted({f"{name}={value}" for place in places for name, value in place.environment.items()})
    printer.say(
        f"{counted(sum(len(place.ranks) for place in places), 'rank')} on {where}; they meet at "
        f"{meeting.address}:{meeting.port}{'; ' if interfaces else ''}{' '.join(interfaces)}; output in {logs}"
    )
    title = f"--- {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}, start {number}: {shlex.join(command)}"
    return Attempt(job, places, title, run.at_stop, printer, stop).run()


def _way(failure: RankFailure) -> str:
    """Return how something failed, without the numbers of ranks, processes and times."""
    return f"{failure.status} {re.sub(r'[0-9]+', '#', failure.text)}"


def _is_of_outside(failure: RankFailure) -> bool:
    return failure.is_of_outside or "lost contact" in failure.text
