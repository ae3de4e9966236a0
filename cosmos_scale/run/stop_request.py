"""Signals and the time limit as wishes to stop: noted at once, and met after a whole step, with a checkpoint."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, Final, NoReturn

from cosmos_scale.exit_status import INTERRUPTED

# What launchers, schedulers (Slurm's --signal), limits of the shell and closed terminals send to end a program.
TERMINATIONS: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
HELD = 2.0  # seconds that the main thread gets to end by itself after a second Ctrl-C
START_HELD = 30.0  # seconds that it gets to hear a signal while the start goes on: a library may hold it for ever
LOOK = 0.1  # seconds between looks whether it has
TOGETHER = 1.0  # seconds within which signals are one wish
TIME_LIMIT: Final = 0  # stands for train.max_minutes among the numbers of signals

# A forked process has the parent's sockets: what is sent to a loader would look like a signal to the parent.
os.register_at_fork(after_in_child=partial(signal.set_wakeup_fd, -1))


@contextmanager
def noted_terminations() -> Iterator[list[int]]:
    """Note the numbers of TERMINATIONS in a list, while nothing runs yet that could stop at a step.

    The same signal again, over a second later, ends the process as if nobody noted it: there is nothing to save. So
    does a thread, where the main thread hears neither a signal nor Ctrl-C, since a call of a library holds it.
    """
    noted: list[int] = []
    first = heard = 0.0
    left = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first, heard
        heard = time.monotonic()
        if noted and time.monotonic() - first > TOGETHER:
            _end_by(number)
        first = first or time.monotonic()
        noted.append(number)

    def end_where_held(arrivals: socket.socket) -> None:
        with arrivals:
            while numbers := arrivals.recv(1):
                number = numbers[0]
                if number != signal.SIGINT and number not in before:
                    continue
                came = time.monotonic()
                while heard < came and not left.wait(LOOK):
                    if time.monotonic() - came > START_HELD:
                        name = signal.Signals(number).name
                        os.write(2, f"cosmos-scale: {name}: the start hangs in a library, so it is ended\n".encode())
                        os._exit(INTERRUPTED if number == signal.SIGINT else 128 + number)

    before = {number: signal.signal(number, note) for number in _terminations()}
    arrivals, arrival = socket.socketpair()
    arrival.setblocking(False)
    wakeup = signal.set_wakeup_fd(arrival.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=end_where_held, args=(arrivals,), name="noted terminations", daemon=True).start()
    try:
        yield noted
    finally:
        left.set()
        signal.set_wakeup_fd(wakeup)
        arrival.close()  # which ends the thread
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Why this process wants the run to stop at the next step boundary: a signal or the time limit.

    A context: inside it SIGINT and TERMINATIONS only ask to stop; another SIGINT, over a second later, interrupts at
    once. Where the main thread hears nothing, since a call of a library holds it, a thread ends the process then.
    """

    def __init__(self, max_minutes: float | None, noted: Sequence[int] = ()) -> None:
        """noted: signals that came before."""
        self._deadline = None if max_minutes is None else time.monotonic() + 60.0 * max_minutes
        self._signal = noted[0] if noted else None
        self._signalled = time.monotonic()
        self._handlers: dict[int, Any] = {}
        self._left = threading.Event()

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, *_terminations()):
            self._handlers[number] = signal.signal(number, self._note)
        self._arrivals, self._arrival = socket.socketpair()
        self._arrival.setblocking(False)
        # Python's handlers wait for the main thread; the numbers of signals come here at once.
        self._wakeup = signal.set_wakeup_fd(self._arrival.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._end_where_held, name="stop request", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        signal.set_wakeup_fd(self._wakeup)
        self._arrival.close()  # which ends the thread
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._signalled = number, now
        # Programs that wrap this one pass on the Ctrl-C that a terminal sends to all: two at once are one wish.
        elif number == signal.SIGINT and now - self._signalled > TOGETHER:
            raise KeyboardInterrupt

    def _end_where_held(self) -> None:
        first = None
        with self._arrivals:
            while numbers := self._arrivals.recv(1):
                now = time.monotonic()
                first = now if first is None else first
                if numbers[0] == signal.SIGINT and now - first > TOGETHER and not self._left.wait(HELD):
                    os.write(2, b"cosmos-scale train: interrupted\n")
                    os._exit(INTERRUPTED)

    @property
    def reason(self) -> int | None:
        """The number of the signal that came first, else TIME_LIMIT where the time is over, else None."""
        if self._signal is not None:
            return self._signal
        return TIME_LIMIT if self._deadline is not None and time.monotonic() > self._deadline else None


def encode_reason(reason: int | None, rank: int, world_size: int) -> int:
    """Return a number for a rank's reason to stop, 0 for none: of all ranks' numbers the largest decides.

    It is that of a signal before the time limit, and of the lowest rank.
    """
    return 0 if reason is None else 1 + reason * world_size + (world_size - 1 - rank)


def name_reason(encoded: int, world_size: int) -> str:
    """Return in words what `encode_reason` put in a number."""
    reason, rest = divmod(encoded - 1, world_size)
    if reason == TIME_LIMIT:
        return "train.max_minutes is over"
    name = signal.Signals(reason).name
    return name if world_size == 1 else f"{name} at rank {world_size - 1 - rest}"


def ignore_terminations() -> None:
    """From here on ignore TERMINATIONS: of a program that has done its work, and only has to leave."""
    for number in TERMINATIONS:
        signal.signal(number, signal.SIG_IGN)


def _terminations() -> list[signal.Signals]:
    """Return TERMINATIONS, without SIGHUP under nohup, which lets a program go on when its terminal is closed."""
    return [
        number for number in TERMINATIONS if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    ]


def _end_by(number: int) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise SystemExit(128 + number)
