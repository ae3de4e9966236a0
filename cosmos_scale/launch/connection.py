"""The launcher's connection to a program that it starts on a host: its own child, or a child of ssh."""

import os
import shlex
import subprocess
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from cosmos_scale.errors import UserError
from cosmos_scale.host import python_command
from cosmos_scale.launch.hostfile import Host
from cosmos_scale.launch.wire import Inbox, Message, Outbox

# No question that nobody answers, and no line of ssh's own. The launcher itself tells a connection that is silent.
_SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "LogLevel=ERROR")

START_SECONDS = 60.0  # for a program's start on another host, before anything that takes long is imported

# Variables that say who and where a process is; a process on another host has its own.
_OF_THE_HOST = {
    "DISPLAY",
    "HOME",
    "HOSTNAME",
    "LOGNAME",
    "MAIL",
    "OLDPWD",
    "PWD",
    "SHELL",
    "SHLVL",
    "TERM",
    "TMPDIR",
    "USER",
    "XAUTHORITY",
    "_",
}
_OF_THE_HOST_BEGIN = ("SSH_", "XDG_", "DBUS_", "SLURM_", "SLURMD_", "OMPI_", "PMI_", "PMIX_", "TORCHELASTIC_")
# What launchers set for a rank; the launch sets its own.
RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
)


def passed_environment() -> dict[str, str]:
    """Return the variables of this process that ranks on every host get: all but a host's own and a rank's own."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_THE_HOST and not name.startswith(_OF_THE_HOST_BEGIN) and name not in RANK_VARIABLES
    }


class Connection:
    """A program of this package on a host, and the messages to and from it."""

    def __init__(self, host: Host, module: str, folder: Path) -> None:
        """module: what `python -m` runs there, in a folder that every host has; raises UserError without ssh."""
        self.host = host
        try:
            self._process = subprocess.Popen(
                _command(host, module, folder),
                cwd=folder if host.is_here else None,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # so that Ctrl-C reaches the launcher alone
            )
        except OSError as error:
            if error.filename is None:  # of the process itself: few processes, memory or files are allowed
                raise
            raise UserError(f"host {host.name}: {error.filename}: {error.strerror}; rule: ssh is on PATH") from error
        process = self._process
        assert process.stdin and process.stdout and process.stderr  # noqa: PT018 (one fact: all are pipes)
        self._pipes = process.stdin, process.stdout, process.stderr
        # Until the program is there: a .bashrc that reads standard input would take the messages.
        self.outbox = Outbox(process.stdin.fileno(), is_held=True)
        self.inbox, self.errors = Inbox(process.stdout.fileno()), Inbox(process.stderr.fileno())
        self.heard = self._opened = time.monotonic()
        self._said: deque[str] = deque(maxlen=20)

    def receive(self) -> tuple[list[Message], list[str]]:
        """Return the messages that have come, and the other lines that the program or ssh printed."""
        messages, others = self.inbox.messages()
        others += self.errors.lines()
        self._said.extend(line for line in others if line.strip())
        if messages:  # the first one says that the program is there
            self.heard = time.monotonic()
            self.outbox.is_held = False
            self.outbox.flush()
        return messages, others

    @property
    def obstacle(self) -> str | None:
        """Return what keeps the program from its start on another host; None: it has started, or it may still."""
        if not self.outbox.is_held or self.host.is_here or time.monotonic() - self._opened < START_SECONDS:
            return None
        return (
            f"no program has started there within {START_SECONDS:g} s, perhaps since a login script, such as .bashrc, "
            "reads standard input"
        )

    @property
    def has_ended(self) -> bool:
        """Whether no message can come any more."""
        return self.inbox.closed

    def reason(self) -> str:
        """Return why the connection has ended, as ssh or the program says it."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(2.0)
        self.receive()
        said = self._said[-1].strip() if self._said else ""
        status = self._process.poll()
        if said or self.host.is_here:
            return said or f"exit status {status}"
        by_login = ", before a program started: a file such as .bashrc ends the shell there" if status == 0 else ""
        return f"ssh ended with status {status}{by_login}"

    def close(self) -> None:
        """Close the way to the program, which then ends by itself."""
        self.outbox.closed = True
        with suppress(OSError):
            self._pipes[0].close()

    def hang_up(self) -> None:
        """Close the connection; the program ends by itself, or ssh ends, and nothing is left of the local process."""
        self.close()
        process = self._process
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # of a process that waits for a file server for ever
                process.wait(1.0)
        for pipe in self._pipes[1:]:
            pipe.close()


def _command(host: Host, module: str, folder: Path) -> list[str]:
    python = python_command(module)
    if host.is_here:
        return python
    own = [f"PYTHONPATH={os.environ['PYTHONPATH']}"] if "PYTHONPATH" in os.environ else []
    return [*_SSH, "--", host.name, f"cd {shlex.quote(str(folder))} && exec {shlex.join(['env', *own, *python])}"]
