"""Two hosts that are this machine, for a launch over ssh, and the processes that run on them."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

HOSTS = ("host-a", "host-b")
ENDED_WITHIN = 60.0  # seconds from SIGKILL to the end of a process

# Called as `ssh OPTIONS -- HOST COMMAND`.
_SSH = """\
#!/bin/sh
while [ "$1" != -- ]; do shift; done
if [ -e {folder}/gone-"$2" ]; then
  echo "ssh: connect to host $2 port 22: No route to host" >&2
  exit 255
fi
export SOAK_HOST="$2" SSH_CONNECTION="127.0.0.1 1 127.0.0.1 22"
exec sh -c "$3"
"""


class Hosts:
    """Hosts with a rank each, which a program `ssh` of the folder reaches; a host that is gone cannot be reached."""

    def __init__(self, folder: Path) -> None:
        """folder: for the program and the files of hosts."""
        self._folder = folder.absolute()
        self._folder.mkdir(parents=True)
        ssh = self._folder / "ssh"
        ssh.write_text(_SSH.format(folder=self._folder))
        ssh.chmod(0o755)
        for count in range(1, len(HOSTS) + 1):
            self.file(count).write_text("".join(f"{name} slots=1\n" for name in HOSTS[:count]))

    def file(self, count: int) -> Path:
        """Return the file that names so many hosts for a launch."""
        return self._folder / f"hosts-{count}"

    def environment(self) -> dict[str, str]:
        """Return the variables of a launch over these hosts: one thread a rank, on CPUs."""
        path = f"{self._folder}{os.pathsep}{os.environ['PATH']}"
        root = str(Path(__file__).resolve().parents[2])
        return os.environ | {"PATH": path, "PYTHONPATH": root, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    def remove(self, name: str) -> None:
        """Let a host be unreachable; what runs there is not touched."""
        (self._folder / f"gone-{name}").touch()

    def bring_back(self) -> None:
        """Let all hosts be reachable."""
        for file in self._folder.glob("gone-*"):
            file.unlink()


def below(pid: int) -> list[int]:
    """Return all processes that a process has started, and those that these have started."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        parent = _stat(int(folder.name), 1)
        if parent:
            parents.setdefault(int(parent), []).append(int(folder.name))
    found, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def ranks_below(pid: int) -> dict[int, int]:
    """Return the processes of a launch's ranks, by rank."""
    ranks = {}
    for process in below(pid):
        rank = variable(process, "RANK")
        if rank and not variable(int(_stat(process, 1) or 0), "RANK"):  # its loader processes have it too
            ranks[int(rank)] = process
    return ranks


def loaders_of(rank: int) -> list[int]:
    """Return the loader processes of a rank's process, which have its command line."""
    return [process for process in below(rank) if _command(process) == _command(rank)]


def host_of(process: int) -> str:
    """Return the host that a process runs on."""
    return variable(process, "SOAK_HOST")


def end_tree(pid: int) -> None:
    """End a process and all that it has started, at once, and wait until all but the process itself are gone."""
    started = below(pid)
    for process in [pid, *started]:
        kill(process)
    deadline = time.monotonic() + ENDED_WITHIN
    while any(map(lives, started)) and time.monotonic() < deadline:
        time.sleep(0.05)


def lives(pid: int) -> bool:
    """Tell whether a process runs or is stopped."""
    return _stat(pid, 0) not in ("", "Z")


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal a process, where it is there still."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def variable(pid: int, name: str) -> str:
    """Return a variable of a process as it was started with, empty where there is none."""
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(f"{name}=".encode()):
                return entry.partition(b"=")[2].decode()
    return ""


def _command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _stat(pid: int, field: int) -> str:
    """Return a field behind the name of a process's status (0: its state, 1: its parent), empty where it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[field]
    return ""
