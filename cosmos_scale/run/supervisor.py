"""The launcher above a rank: at its end the rank stops with a checkpoint, since nobody else would end it.

DeepSpeed's launcher and torchrun leave their ranks behind where they are killed: such ranks would train on, and hold
the port and the run's folder. The agents of `cosmos-scale launch` have a signal of the kernel instead.
"""

import os
import signal
import threading
import time
from pathlib import Path

LOOK = 1.0  # seconds between looks

_LAUNCHERS = (b"deepspeed", b"torchrun", b"torch.distributed.run")  # in their command lines
_OVER_SSH = b"@notty"  # how the command line of the sshd ends whose client runs one command
_LEVELS = 16  # of processes above this one, at most


def stop_with_launcher() -> None:
    """Send this process SIGTERM when a launcher above it ends, from a thread; nothing where there is no launcher.

    A shell above the launcher may end: a launcher under nohup goes on then.
    """
    if "RANK" in os.environ and (launchers := _launchers()):
        threading.Thread(target=_watch, args=(launchers,), name="supervisor", daemon=True).start()


def _watch(launchers: dict[int, str]) -> None:
    while all(_start_of_live(pid) == start for pid, start in launchers.items()):
        time.sleep(LOOK)
    os.kill(os.getpid(), signal.SIGTERM)


def _launchers() -> dict[int, str]:
    """Return the launchers right above this process, with the times at which they have started."""
    found: dict[int, str] = {}
    pid = os.getppid()
    for _ in range(_LEVELS):
        command = _command(pid)
        if not any(name in command for name in _LAUNCHERS) and not (
            found and command.rstrip(b"\0").endswith(_OVER_SSH)
        ):
            break
        found[pid] = _start_of_live(pid)
        pid = int(_status(pid)[1] or 0)
    return {pid: start for pid, start in found.items() if start}


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _start_of_live(pid: int) -> str:
    """Return when a process has started, in the kernel's ticks; empty where it has ended."""
    state, _, start = _status(pid)
    return "" if state in "ZX" else start


def _status(pid: int) -> tuple[str, str, str]:
    """Return a process's state, parent and start; X, nothing and nothing where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[1], fields[19]
    except (OSError, IndexError):
        return "X", "", ""
