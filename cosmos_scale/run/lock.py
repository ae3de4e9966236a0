"""The lock of a run: one launch at a time, and one that died holds nobody up.

The file `launch.lock` in the run's folder says who holds it: `cosmos-scale launch`, or else the first rank. The holder
has a lock of the file system on it, which ends with its process, and touches it every few seconds. Where a file system
has no locks, or locks of one host alone, the touches tell a holder that lives: their times and the time of now are both
the file server's.

Ranks live on for a while where their launch is killed: they end their step and save. So the first rank holds a lock of
its own, `ranks.lock`, for which the first rank of the next launch waits.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from cosmos_scale.errors import UserError
from cosmos_scale.files import no_locks, regular_only, writing

LOCK_FILE = "launch.lock"
RANKS_LOCK_FILE = "ranks.lock"
LAUNCH_TOKEN = "COSMOS_SCALE_LAUNCH"  # environment variable of the ranks of a launch: its lock's token
TOUCHED_EVERY = 10.0  # seconds
NAMED_AFTER = 2.0  # seconds within which a launch that has the lock writes its name
DEAD_AFTER = 45.0  # seconds without a touch
LAST_TOUCH = 5.0  # seconds: the file server may be away
RANKS_END_WITHIN = 600.0  # seconds that ranks of a dead launch get for their step and their checkpoint
POLL = 0.2  # seconds between looks at their lock

_FLOCK = "hhqqi"  # struct flock of 64-bit Linux


class RunLock:
    """The lock on a run's folder, as a context; raises UserError where another launch holds it, and names that one.

    token: what tells this lock from all others. While the lock is held its process must not open the file anew: the
    system gives the lock back when any of a process's descriptors of the file is closed.
    """

    def __init__(
        self,
        folder: Path,
        say: Callable[[str], None],
        *,
        file: str = LOCK_FILE,
        touched_every: float = TOUCHED_EVERY,
        dead_after: float = DEAD_AFTER,
    ) -> None:
        """say: is told of a wait, and of a file that is gone. file: the lock's, LOCK_FILE or RANKS_LOCK_FILE."""
        self.token = secrets.token_hex(8)
        self._say = say
        self._path = folder / file
        self._every, self._dead_after = touched_every, dead_after
        self._descriptor = -1
        self._ends = threading.Event()
        self._toucher = threading.Thread(target=self._touch, daemon=True)

    def __enter__(self) -> "RunLock":
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = regular_only(str(self._path), os.O_RDWR | os.O_CREAT)
        try:
            self._take()
        except BaseException:
            os.close(self._descriptor)
            raise
        self._toucher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._toucher.join(LAST_TOUCH)
        with suppress(OSError):  # of a disk that is full or gone: the lock ends with the process, or with its touches
            # The file stays, empty: another launch may wait for a lock on this very file.
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def _take(self) -> None:
        with writing(self._path):
            locks = self._lock()
            holder = _holder(self._descriptor)
            if holder is not None and self._lives(holder, locks):
                self._refuse(holder)
            own = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": _start_of(os.getpid()),
                "since": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
                "token": self.token,
            }
            data = json.dumps(own).encode()
            os.ftruncate(self._descriptor, 0)
            if os.pwrite(self._descriptor, data, 0) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with suppress(OSError):  # an error of the disk may pass; ranks that do not see the name say so themselves
                os.fsync(self._descriptor)  # ranks of other hosts read it
            if not locks:
                time.sleep(min(2.0, self._every))  # two launches of one moment: the later one's name stays
                holder = _holder(self._descriptor)
                if holder is not None and holder != own:
                    self._refuse(holder)

    def _lock(self) -> bool:
        """Return whether the lock is this process's now, False where the file system has none; else refuse."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if no_locks(error):
                return False
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            self._refuse(self._holder_soon())
        return True

    def _holder_soon(self) -> dict[str, Any]:
        """Return what the file says of the launch that has the lock, which may be about to write its name."""
        until = time.monotonic() + NAMED_AFTER
        while (holder := _holder(self._descriptor)) is None and time.monotonic() < until:
            time.sleep(0.05)
        return holder or {}

    def _lives(self, holder: dict[str, Any], locks: bool) -> bool:
        """Tell whether the launch that the file names still runs; waits for its next touch where only that can tell."""
        if holder.get("host") == socket.gethostname():
            if locks:
                return False  # this host's locks count for all of its processes
            if _start_of(holder.get("pid", 0)) == holder.get("started"):
                return True
        began, first = time.monotonic(), os.stat(self._path).st_mtime
        told = False
        # The last touch may lie ahead, where a host's clock did: then the time of this wait tells.
        while max(_server_time(self._path.parent) - first, time.monotonic() - began) < self._dead_after:
            if os.stat(self._path).st_mtime != first:
                return True
            if not told:
                told = True
                self._say(
                    f"waiting, {self._dead_after:g} s at most, for a sign of life of the launch on host "
                    f"{holder.get('host', 'unknown')} that {self._path} names"
                )
            time.sleep(self._every / 10)
        return False

    def _refuse(self, holder: dict[str, Any]) -> None:
        rule = "rule: one launch of a run at a time, so stop that one, or give this run another name"
        what = (
            "is launched already" if self._path.name == LOCK_FILE else "is still trained by an earlier launch's ranks"
        )
        raise UserError(f"{self._path.parent}: this run {what}, {_named(holder)}; {rule}")

    def _touch(self) -> None:
        while not self._ends.wait(self._every):
            with suppress(OSError):  # a file server that is away for a while
                os.utime(self._descriptor)
                if not self._path.exists():
                    self._make_again()

    def _make_again(self) -> None:
        """Make the file anew, which somebody has deleted, often with the folder: else a second launch is let in."""
        name = os.pread(self._descriptor, 1 << 16, 0)
        self._path.parent.mkdir(exist_ok=True)
        descriptor = regular_only(str(self._path), os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not no_locks(error):
                os.close(descriptor)
                raise
        os.pwrite(descriptor, name, 0)
        deleted, self._descriptor = self._descriptor, descriptor
        os.close(deleted)
        if self._path.name == RANKS_LOCK_FILE:  # the launch's own lock is often gone too: one line is enough
            self._say(
                f"{self._path}: gone while the run trains, with all that lay beside it if the folder was deleted or "
                f"moved; the run goes on in {self._path.parent}"
            )


def hold_linked(checkpoints: Path, held: ExitStack, say: Callable[[str], None]) -> None:
    """Hold the folder that a run's checkpoints are linked to, where they are; else nothing is done.

    The links of two runs may lead to one folder, and each would delete the other's checkpoints. Where the link leads to
    the checkpoints of another run, the lock is that run's.
    Raises UserError where another run saves there.
    """
    if (refusal := other_run_saves(checkpoints)) is not None:
        raise UserError(refusal)
    if (place := _linked_place(checkpoints)) is not None:
        held.enter_context(RunLock(place, say, file=RANKS_LOCK_FILE))


def other_run_saves(checkpoints: Path) -> str | None:
    """Return the refusal of a launch whose checkpoints are linked to where another run saves now, None elsewhere."""
    place = _linked_place(checkpoints)
    if place is None or (holder := who_holds(place, RANKS_LOCK_FILE)) is None:
        return None
    return (
        f"output: {checkpoints} leads to {os.path.realpath(checkpoints)}, where another run saves, {holder}; "
        "rule: a run's checkpoints lie in a folder of their own"
    )


def _linked_place(checkpoints: Path) -> Path | None:
    """Return where the lock lies of the folder that a run's checkpoints are linked to, None where they are not."""
    if not os.path.islink(checkpoints):
        return None
    target = Path(os.path.realpath(checkpoints))  # of links in a circle too, which a dry run has refused
    is_of_a_run = target.name == checkpoints.name and os.access(target.parent, os.W_OK | os.X_OK)
    place = target.parent if is_of_a_run else target
    return None if place == Path(os.path.realpath(checkpoints.parent)) else place


def _server_time(folder: Path) -> float:
    """Return the time as the clock of a folder's file server has it; raises OSError where nothing can be written."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".now-") as file:
        file.write(b"now")
        file.flush()
        return os.stat(file.name).st_mtime


def launcher_holds(folder: Path) -> bool:
    """Tell whether the lock on a run's folder is of the launch that has started this process."""
    token = os.environ.get(LAUNCH_TOKEN)
    return token is not None and token_in(folder) == token


def token_in(folder: Path) -> str | None:
    """Return the token of the lock on a run's folder, None where nobody has it or has left its name."""
    holder = _read_holder(folder / LOCK_FILE)
    return None if holder is None else holder.get("token")


def wait_for_ranks(
    folder: Path, say: Callable[[str], None], *, seconds: float = RANKS_END_WITHIN, dead_after: float = DEAD_AFTER
) -> None:
    """Wait until the first rank of an earlier launch, which was killed, has ended; `say` is told of a wait.

    Nothing is waited for where another launch lives: it is refused by its own lock. A rank of another host is dead
    where its lock is not touched for `dead_after` seconds of waiting, whatever the clocks say.
    Raises UserError where the rank lives on after some seconds.
    """
    deadline, told = time.monotonic() + seconds, False
    touched, since = 0.0, time.monotonic()
    while (holder := who_holds(folder, RANKS_LOCK_FILE)) is not None:
        if who_holds(folder) is not None and not launcher_holds(folder):
            return
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder}: ranks of an earlier launch still train this run after {seconds:g} s, the first one "
                f"{holder}; rule: one launch of a run at a time, so end them"
            )
        if not told:
            told = True
            say(f"waiting, {seconds:g} s at most, for the end of an earlier launch's ranks, the first one {holder}")
        if (last := _touched_elsewhere(folder / RANKS_LOCK_FILE)) is None or last != touched:
            touched, since = last or 0.0, time.monotonic()
        elif time.monotonic() - since > dead_after:
            return
        time.sleep(POLL)


def _touched_elsewhere(path: Path) -> float | None:
    """Return the time of a lock's last touch where another host holds it, else None."""
    holder = _read_holder(path)
    with suppress(OSError):
        if holder is not None and holder.get("host") != socket.gethostname():
            return path.stat().st_mtime
    return None


def who_holds(folder: Path, file: str = LOCK_FILE) -> str | None:
    """Return in words who holds a lock on a run's folder, None where nobody does, as far as reading tells."""
    path = folder / file
    holder = _read_holder(path)
    if holder is None:
        return None
    with suppress(OSError), open(path, "rb", opener=regular_only) as opened:
        if holder.get("host") != socket.gethostname():
            now = time.time()
            with suppress(OSError):  # of a folder that is read only: this host's clock may be off the file server's
                now = _server_time(folder)
            lives = now - os.fstat(opened.fileno()).st_mtime < DEAD_AFTER
        else:
            try:
                wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
                lives = struct.unpack(_FLOCK, fcntl.fcntl(opened, fcntl.F_GETLK, wanted))[0] != fcntl.F_UNLCK
            except OSError:  # no locks here
                lives = _start_of(holder.get("pid", 0)) == holder.get("started")
        return _named(holder) if lives else None
    return None


def _read_holder(path: Path) -> dict[str, Any] | None:
    with suppress(OSError), open(path, "rb", opener=regular_only) as file:
        return _holder(file.fileno())
    return None


def _holder(descriptor: int) -> dict[str, Any] | None:
    """Return what the file says of the launch that holds it, None where it holds nobody's name."""
    with suppress(ValueError):
        found = json.loads(os.pread(descriptor, 1 << 16, 0))
        return found if isinstance(found, dict) else None
    return None


def _named(holder: dict[str, Any]) -> str:
    host, pid, since = (holder.get(key, "unknown") for key in ("host", "pid", "since"))
    return f"on host {host} by process {pid} since {since}"


def _start_of(pid: int) -> str:
    """Return when a process of this host started, in the kernel's ticks; empty where there is none."""
    try:
        # After the name, which may hold spaces and brackets, the start is the 20th field.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
