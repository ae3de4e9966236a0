"""One attempt of a launch: ranks started on all hosts, followed to their end, and ended together where one fails."""

import os
import selectors
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.exit_status import FAILED
from cosmos_scale.launch.agent import BEAT
from cosmos_scale.launch.connection import RANK_VARIABLES, Connection
from cosmos_scale.launch.hostfile import Host
from cosmos_scale.launch.printer import Printer
from cosmos_scale.launch.signals import StopSignals
from cosmos_scale.launch.wire import Message

AGENT = "cosmos_scale.launch.agent"

# Seconds after the first failure: until it is named, the other ranks are asked to end, and killed; and until an agent
# that does not answer is left. All ranks end within 30 s.
NAMED_AFTER, ASKED_AFTER, KILLED_AFTER, LEFT_AFTER = 1.0, 10.0, 20.0, 26.0
INTERRUPTED_FOR = 5.0  # seconds from a second Ctrl-C to the end

LOST_CONTACT = "lost contact with another rank"  # in the last line of a rank that ends since another one has ended
FOLLOW_UP = 2  # the weight of a failure that may follow from another one


@dataclass(frozen=True)
class Job:
    """What all ranks run, on all hosts alike.

    folder: where the command runs. environment: variables of all ranks. logs: the folder of the ranks' output, a file a
    rank. link_limit: seconds of silence after which a host, or for a host the launcher, counts as gone. stop_limit:
    seconds that a stop may take; None: however long.
    """

    command: tuple[str, ...]
    folder: Path
    environment: dict[str, str]
    logs: Path
    link_limit: float
    stop_limit: float | None


class HostRanks(NamedTuple):
    """The ranks of one host. environment: variables that only they have, such as the network interface."""

    host: Host
    ranks: range
    environment: dict[str, str]


class RankFailure(NamedTuple):
    """The first thing that went wrong. rank: None where a whole host is lost. status: negative for a signal.

    text: the rank's last line on standard error, or why the host is lost.
    """

    host: str
    rank: int | None
    status: int | None
    text: str

    @property
    def is_of_outside(self) -> bool:
        """Whether something outside of the program ended it: a lost host, or a signal that programs do not cause."""
        return self.status is None or self.status in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)

    def __str__(self) -> str:
        if self.rank is None or self.status is None:
            return f"host {self.host} is lost ({self.text})"
        if self.status < 0:
            with suppress(ValueError):
                return f"rank {self.rank} on host {self.host} was ended by {signal.Signals(-self.status).name}"
        return f"rank {self.rank} on host {self.host} ended with exit status {self.status}"


@dataclass
class Outcome:
    """How an attempt ended. statuses: by rank. failure: the first one, if any. lost: hosts without a connection."""

    statuses: dict[int, int] = field(default_factory=dict)
    failure: RankFailure | None = None
    lost: list[Host] = field(default_factory=list)


class Attempt:
    """Ranks on hosts, from their start to the end of the last one."""

    def __init__(
        self, job: Job, places: Sequence[HostRanks], title: str, at_stop: str, printer: Printer, stop: StopSignals
    ) -> None:
        """title: the line that begins this attempt in the ranks' files. at_stop: what ranks do when asked to stop."""
        self._job, self._at_stop, self._printer, self._stop = job, at_stop, printer, stop
        self._places = {place.host.name: place for place in places}
        self._outcome = Outcome()
        self._failures: list[RankFailure] = []
        self._follow_ups: list[tuple[str, int, str, str]] = []  # arguments of Printer.rank_line
        self._failed_at = self._stopped_at = self._interrupted_at = 0.0  # 0: not yet
        self._is_alone_said = False
        self._sent: set[str] = set()  # the reasons for which the ranks were signalled
        self._beat, self._every = time.monotonic(), min(BEAT, job.link_limit / 4)
        self._open = [Connection(place.host, AGENT, job.folder) for place in places]
        world_size = sum(len(place.ranks) for place in places)
        for connection in self._open:
            connection.outbox.send({"job": self._message(self._places[connection.host.name], world_size, title)})

    def run(self) -> Outcome:
        """Follow the ranks until all have ended; leaves no process that answers, on any host."""
        try:
            while self._open:
                self._wait()
                for connection in list(self._open):
                    self._hear(connection)
                self._keep_time()
        finally:
            for connection in self._open:
                connection.hang_up()
        self._name_failure()
        return self._outcome

    def _message(self, place: HostRanks, world_size: int, title: str) -> Message:
        job, local = self._job, str(len(place.ranks))
        own = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": local, "LOCAL_SIZE": local, "PYTHONUNBUFFERED": "1"}
        environment = job.environment | place.environment | own
        return {
            "command": list(job.command),
            "folder": str(job.folder),
            "environment": environment,
            "unset": [
                name for name in RANK_VARIABLES if name not in environment and name not in ("RANK", "LOCAL_RANK")
            ],
            "ranks": list(place.ranks),
            "logs": str(job.logs),
            "log_name": "".join(sign if sign.isalnum() or sign in "._-" else "_" for sign in place.host.name),
            "title": title,
            # A child's pipe ends with the launcher; a connection over the network may just be silent.
            "link_limit": None if place.host.is_here else job.link_limit,
            "beat": self._every,
            "stop_limit": job.stop_limit,
        }

    def _wait(self) -> None:
        with selectors.DefaultSelector() as waits:
            waits.register(self._stop.wakes, selectors.EVENT_READ)
            for connection in self._open:
                waits.register(connection.inbox, selectors.EVENT_READ)
                if not connection.errors.closed:
                    waits.register(connection.errors, selectors.EVENT_READ)
                if connection.outbox.is_waiting:
                    waits.register(connection.outbox.descriptor, selectors.EVENT_WRITE)
            waits.select(timeout=0.5)
        with suppress(BlockingIOError):
            os.read(self._stop.wakes, 1024)

    def _hear(self, connection: Connection) -> None:
        name = connection.host.name
        messages, others = connection.receive()
        connection.outbox.flush()
        for line in others:
            self._printer.say(f"host {name}: {line}")
        for message in messages:
            if "line" in message:
                self._print(message["line"], message["of"], name, message["kind"])
            elif "ended" in message:
                self._end(name, message["ended"], message["status"], message["last"])
            elif "alone" in message:
                self._say_alone(name, message["alone"])
            elif "done" in message:
                self._leave(connection)
                return
        if connection.has_ended:
            self._lose(connection, connection.reason())
        elif not connection.host.is_here and time.monotonic() - connection.heard > self._job.link_limit:
            self._lose(connection, f"no answer for {self._job.link_limit:g} s")
        elif obstacle := connection.obstacle:
            self._lose(connection, obstacle)

    def _say_alone(self, host: str, why: str) -> None:
        """Say, once, why a host's agent has asked its ranks to stop by itself; other hosts' agents do the same then."""
        if not self._is_alone_said:
            self._is_alone_said = True
            self._printer.say(f"host {host}: {why}")

    def _print(self, line: str, rank: int, host: str, kind: str) -> None:
        """Print a rank's line; one that tells of another rank's end waits until it is known what came first."""
        if LOST_CONTACT in line and self._outcome.failure is None:
            self._follow_ups.append((line, rank, host, kind))
        elif LOST_CONTACT not in line or not self._names_the_cause():
            self._printer.rank_line(line, rank, host, kind)

    def _names_the_cause(self) -> bool:
        """Whether the failure that is named is no follow-up of another one: then lines on follow-ups say nothing."""
        return self._outcome.failure is not None and _weight(self._outcome.failure) < FOLLOW_UP

    def _end(self, host: str, rank: int, status: int, last: str) -> None:
        self._outcome.statuses[rank] = status
        if status != 0:
            self._fail(RankFailure(host, rank, status, last))

    def _lose(self, connection: Connection, reason: str) -> None:
        self._outcome.lost.append(connection.host)
        for rank in self._places[connection.host.name].ranks:
            self._outcome.statuses.setdefault(rank, FAILED)
        self._fail(RankFailure(connection.host.name, None, None, reason))
        self._leave(connection)

    def _leave(self, connection: Connection) -> None:
        self._open.remove(connection)
        connection.hang_up()

    def _fail(self, failure: RankFailure) -> None:
        self._failures.append(failure)
        self._failed_at = self._failed_at or time.monotonic()

    def _name_failure(self) -> None:
        """Choose the failure that came first: survivors end by themselves, so a signal or a lost host counts more."""
        if not self._failures or self._outcome.failure is not None:
            return
        self._outcome.failure = min(self._failures, key=_weight)
        if not self._names_the_cause():
            for follow_up in self._follow_ups:
                self._printer.rank_line(*follow_up)
        others = "; the other ranks are ended" if self._open else ""
        if self._stop.first is None:
            self._printer.say(f"{self._outcome.failure}{others}")

    def _keep_time(self) -> None:
        now = time.monotonic()
        if now - self._beat > self._every:
            self._beat = now
            for connection in self._open:
                connection.outbox.send({"alive": True}, may_drop=True)
        if self._stop.first is not None and not self._stopped_at:
            self._stopped_at = now
            self._printer.say(f"{self._stop.first}: the ranks {self._at_stop}; Ctrl-C ends them at once")
            self._signal("stop", signal.SIGTERM)
        if self._stop.at_once and not self._interrupted_at:
            self._interrupted_at = now
            self._printer.say("a second Ctrl-C: the ranks are ended at once")
            self._signal("at once", signal.SIGINT)
        limits = []  # when the ranks are killed
        if self._failed_at:
            if now - self._failed_at > NAMED_AFTER:
                self._name_failure()
            if now - self._failed_at > ASKED_AFTER:
                self._signal("failed", signal.SIGTERM)
            limits.append(self._failed_at + KILLED_AFTER)
        if self._interrupted_at:
            limits.append(self._interrupted_at + INTERRUPTED_FOR)
        if self._stopped_at and self._job.stop_limit is not None:
            limits.append(self._stopped_at + self._job.stop_limit)
        if limits and now > min(limits):
            if self._signal("kill", signal.SIGKILL):
                self._printer.say("the ranks that are left are killed")
            if now > min(limits) + LEFT_AFTER - KILLED_AFTER:
                for connection in list(self._open):
                    self._lose(connection, "its agent does not end its ranks")

    def _signal(self, why: str, number: signal.Signals) -> bool:
        """Signal all ranks, once for a reason; returns whether this was the first time."""
        if why in self._sent:
            return False
        self._sent.add(why)
        for connection in self._open:
            connection.outbox.send({"signal": int(number)})
        return True


def _weight(failure: RankFailure) -> int:
    """Return 0 for what ends a rank from outside, 1 for what a rank ends by itself, else FOLLOW_UP."""
    if failure.status is None or failure.status < 0:
        return 0
    return FOLLOW_UP if failure.status == FAILED else 1
