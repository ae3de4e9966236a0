"""The watchdog: a run whose loop stands still writes every rank's stacks, names who does not answer, and ends.

A thread of each rank looks whether the main thread goes on from phase to phase. Ranks ask each other over the
connections of `engine.contact`, since no collective would come to its end. A process that is stopped (SIGSTOP), or
whose host is gone, cannot speak: the others name it.
"""

import faulthandler
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import NamedTuple, NoReturn

from cosmos_scale.engine.contact import Contact
from cosmos_scale.exit_status import FAILED
from cosmos_scale.files import reason_of

LONGER = 4.0  # times the limit, for what takes longer than a step: the start and first step, evaluations, checkpoints
WARNED = 0.25  # part of the limit after which a standstill is told; between steps it is told before:
WARNED_STEPS, WARNED_SECONDS = 5.0, 30.0  # after as long as some steps take on average, and some seconds at least
LOOK = 0.25  # seconds between looks
ANSWER = 3.0  # seconds in which a rank that lives says what it does
DISK, TERMINAL = 10.0, 1.0  # seconds for what may never end either: writing the stacks, printing a line
NAMED = 8  # ranks that a line names of those that do the same
ASK, DOES, HANGS, WROTE = "ask", "does", "hangs", "wrote"


class _Phase(NamedTuple):
    """What the main thread does. number: counts all progress. times: of the limit that it may take. since: when."""

    number: int
    what: str
    times: float
    since: datetime


class Watchdog:
    """Ends the process where the main thread enters no new phase for some seconds; a context, none where they are 0.

    The time that this process itself was stopped does not count, so that it goes on when it is continued.
    """

    def __init__(
        self, seconds: float, folder: Path, contact: Contact, collectives: Callable[[], Sequence[str]]
    ) -> None:
        """seconds: the limit. folder: the run's, for the stacks. collectives: lines on this rank's, for that file."""
        self._seconds, self._folder, self._contact, self._collectives = seconds, folder, contact, collectives
        self._hosts = {**contact.hosts, contact.rank: socket.gethostname()}
        self._usual = LONGER  # until the first step is done: it compiles
        self._phase = _Phase(0, "the start of the run", LONGER, datetime.now())
        self._steps, self._first_step_end, self._step_seconds = 0, 0.0, 0.0
        self._answers: dict[int, str] = {}  # by rank, since the last question
        self._idle = 0.0  # seconds in this phase
        self._hangs = False  # as another rank has found
        self._ending: dict[int, str] = {}  # what ranks did that have found so, and end
        self._wrote: dict[int, str] = {}  # by rank that has written its stacks, or has not: why not
        self._unwritten = f"they were not written within {DISK:g} s"  # why this rank's are not; nothing once they are
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._seconds > 0:
            self._contact.listen(self._hear)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def enter(self, what: str) -> None:
        """Note what the main thread begins to do."""
        self._phase = _Phase(self._phase.number + 1, what, self._usual, datetime.now())

    def step_done(self) -> None:
        """Note that a step is done: from here on no phase compiles."""
        self._usual, now = 1.0, time.monotonic()
        if self._steps == 0:
            self._first_step_end = now
        else:
            self._step_seconds = (now - self._first_step_end) / self._steps
        self._steps += 1

    @contextmanager
    def longer(self, what: str) -> Iterator[Callable[[], None]]:
        """Allow LONGER times the limit for what the block does, and anew each time that it calls what this yields."""
        self._phase = _Phase(self._phase.number + 1, what, LONGER, datetime.now())

        def goes_on() -> None:
            self._phase = self._phase._replace(number=self._phase.number + 1)

        try:
            yield goes_on
        finally:
            self.enter(f"what follows {what}")

    @contextmanager
    def before(self, what: str, seconds: float) -> Iterator[None]:
        """Allow LONGER times the limit, and some seconds beyond, for what follows the block and knows its own end."""
        try:
            yield
        finally:
            times = LONGER + (seconds / self._seconds if self._seconds > 0 else 0.0)
            self._phase = _Phase(self._phase.number + 1, what, times, datetime.now())

    def _watch(self) -> None:
        seen, told, last = self._phase, False, time.monotonic()
        while not self._ended.wait(LOOK):
            # A process that was stopped finds a long span here, in which it could not go on.
            now = time.monotonic()
            self._idle += min(now - last, 2 * LOOK)
            last, phase = now, self._phase
            if phase.number != seen.number:
                if told and self._contact.rank == 0:
                    self._print(f"progress again after {self._idle:.0f} s: {phase.what}")
                seen, told, self._idle = phase, False, 0.0
            limit = self._seconds * phase.times
            if self._hangs or self._idle > limit:
                self._end()
            # Where a rank is lost, the contact tells of it, and nothing goes on.
            if self._idle > self._told_after(phase, limit) and not told and self._contact.lost is None:
                told = True
                self._warn(limit)

    def _told_after(self, phase: _Phase, limit: float) -> float:
        """Return the seconds after which a standstill is told: a line for each step of a slow model would be noise."""
        usual = max(WARNED_SECONDS, WARNED_STEPS * self._step_seconds)
        return min(WARNED * limit, usual) if phase.times == 1.0 and self._steps > 1 else WARNED * limit

    def _warn(self, limit: float) -> None:
        """Say that the run stands still; ranks other than the first one only where rank 0 cannot say it."""
        silent = self._ask()
        if self._contact.rank == 0 or silent:
            after = "the run goes on when it comes back, and ends after"
            self._print(f"no progress for {self._idle:.0f} s: {self._found(silent)}; {after} {limit:.0f} s")

    def _end(self) -> NoReturn:
        """End this process and, through rank 0, all others; no group is destroyed, since that could wait for ever."""
        try:
            may_print = self._contact.end()
            self._contact.send_all(f"{HANGS} {self._phase.what}")
            _within(DISK, self._write_stacks)
            self._wrote[self._contact.rank] = self._unwritten
            self._contact.send_all(f"{WROTE} {self._unwritten}")
            silent, lost = self._ask(), self._contact.lost
            speaks = may_print and (self._contact.rank == 0 or bool(silent) or lost is not None)
            if speaks:
                stacks = self._folder / "hang-rank-*.txt"
                rule = f"rule: train.watchdog_seconds, {self._seconds:g}"
                found = "; ".join(filter(None, [lost, self._found(silent)]))
                self._print(f"no progress for {self._idle:.0f} s: {found}; stacks: {stacks}; {rule}")
            # With the end of one process the main threads of others fail: rank 0 ends first, after all have written.
            if self._contact.rank == 0:
                _wait_until(lambda: self._contact.hosts.keys() <= self._wrote.keys() | silent.keys(), DISK + ANSWER)
            elif not silent:
                _wait_until(lambda: not self._contact.hosts, 2 * (DISK + ANSWER))
            unwritten = {rank: why for rank, why in self._wrote.items() if why}
            if speaks and unwritten:
                self._print(f"stacks not written: {'; '.join(self._together(unwritten))}")
            for child in multiprocessing.active_children():  # loader processes, stopped ones too
                child.kill()
        finally:  # whatever fails here: nothing else would end the process
            os._exit(FAILED)

    def _ask(self) -> Mapping[int, str]:
        """Ask what the other ranks do (rank 0 all, others rank 0); returns the hosts of the silent ones, by rank."""
        self._answers = {}
        asked = self._contact.hosts
        self._contact.send_all(ASK)
        _wait_until(lambda: asked.keys() <= self._others().keys(), ANSWER)
        others = self._others()
        return {rank: host for rank, host in asked.items() if rank not in others}

    def _others(self) -> dict[int, str]:
        """Return what other ranks do: their answers, or, of one that ended before its answer, its last word."""
        return {**self._ending, **self._answers}

    def _hear(self, rank: int, line: str) -> None:
        """In the contact's thread: what another rank's watchdog says."""
        word, _, rest = line.partition(" ")
        if word == DOES:
            self._answers[rank] = rest
        elif word == WROTE:
            self._wrote[rank] = rest
        else:
            if word == HANGS:
                self._ending[rank] = rest
                self._hangs = True
            ends = "its end, after " if self._ended.is_set() else ""  # as with the end of another rank
            self._contact.send_all(f"{DOES} {ends}{self._phase.what}", to=rank)

    def _found(self, silent: Mapping[int, str]) -> str:
        """Return who does not answer, and what the others do."""
        parts = [f"rank {rank} on host {host} does not answer" for rank, host in list(silent.items())[:NAMED]]
        if len(silent) > NAMED:
            parts.append(f"nor do {len(silent) - NAMED} others")
        return "; ".join(parts + self._together({**self._others(), self._contact.rank: self._phase.what}))

    def _together(self, said: Mapping[int, str]) -> list[str]:
        """Return what is said of ranks, with all ranks of which it is said; what is said of few comes first."""
        of: dict[str, list[int]] = {}
        for rank, what in sorted(said.items()):
            of.setdefault(what, []).append(rank)
        parts = []
        for what, ranks in sorted(of.items(), key=lambda item: len(item[1])):
            named = [f"rank {rank} on host {self._hosts[rank]}" for rank in ranks[:NAMED]]
            more = f" and {len(ranks) - NAMED} others" if len(ranks) > NAMED else ""
            parts.append(f"{', '.join(named)}{more}: {what}")
        return parts

    def _write_stacks(self) -> None:
        try:
            stacks = _stacks()
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"hang-rank-{self._contact.rank}.txt"
            _keep_earlier(path)
            with path.open("w") as file:
                when = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}"
                where = f"rank {self._contact.rank} on host {socket.gethostname()}, process {os.getpid()}"
                since = f"(since {self._phase.since:%Y-%m-%d %H:%M:%S})"
                file.write(f"{when}: {where}: {self._phase.what} {since} for {self._idle:.0f} s without progress\n")
                file.writelines(f"{line}\n" for line in self._collectives())
                file.write(stacks)
            self._unwritten = ""
        except OSError as error:
            self._unwritten = reason_of(error)

    def _print(self, line: str) -> None:
        told = f"cosmos-scale train: {datetime.now():%m-%d %H:%M:%S} {line}"
        _within(TERMINAL, lambda: print(told, file=sys.stderr, flush=True))


def _keep_earlier(path: Path) -> None:
    """Rename the file of an earlier standstill: a launch that starts again may stand still again, in another place."""
    if path.is_file():
        names = (path.with_name(f"{path.name}.old{'' if number == 1 else f'-{number}'}") for number in count(1))
        path.rename(next(name for name in names if not os.path.lexists(name)))


def _stacks() -> str:
    """Return the stacks of all threads: faulthandler holds Python's lock while it writes, so not to a disk."""
    with open(os.memfd_create("stacks"), "w+", errors="replace") as memory:
        faulthandler.dump_traceback(memory, all_threads=True)
        memory.seek(0)
        return memory.read()


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def _within(seconds: float, work: Callable[[], object]) -> None:
    """Do what may never end in a thread, and wait some seconds for it; leave it where no thread can be started."""
    thread = threading.Thread(target=work, daemon=True)
    with suppress(RuntimeError, MemoryError):
        thread.start()
        thread.join(seconds)
