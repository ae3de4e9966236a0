"""The launcher above a rank: at its end the rank stops with a checkpoint, since nobody else would end it.

DeepSpeed's launcher and torchrun leave their ranks behind where they are killed: such ranks would train on, and hold
the port and the run's folder. The agents of `cosmos-scale launch` have a signal of the kernel instead.

`deepspeed --hostfile` starts pdsh, which starts an ssh for each host. Where `deepspeed` alone is killed, nothing ends
on the hosts. But a rank of the host that it ran on finds it above the ssh at the other end of the rank's connection.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import pairwise
from pathlib import Path

from cosmos_scale.errors import UserError

LOOK = 1.0  # seconds between looks

_DEEPSPEED = b"deepspeed.launcher.launch"  # in the command line of what deepspeed runs on each host
_LAUNCHERS = (b"deepspeed", b"torchrun", b"torch.distributed.run")  # in their command lines
_OVER_SSH = b"@notty"  # how the command line of the sshd ends whose client runs one command
_LEVELS = 16  # of processes above this one, at most
_HOSTFILE = (b"-H", b"--hostfile")  # of deepspeed
_SHELLS = (b"sh", b"bash", b"csh", b"dash", b"fish", b"ksh", b"tcsh", b"zsh")


def stop_with_launcher() -> None:
    """Send this process SIGTERM when a launcher above it ends, from a thread; nothing where there is no launcher.

    A shell above the launcher may end: a launcher under nohup goes on then.
    """
    if "RANK" in os.environ and (launchers := _launchers()):
        threading.Thread(target=_watch, args=(launchers,), name="supervisor", daemon=True).start()


def is_child_of_deepspeed() -> bool:
    """Whether deepspeed has started this process."""
    return _DEEPSPEED in _command(os.getppid())


def refuse_missing_hostfile() -> None:
    """Raise UserError where deepspeed above this rank was given a hostfile that is missing.

    deepspeed itself warns, and starts ranks on its own host alone.
    """
    for pid in _launchers_from(os.getppid()) if "RANK" in os.environ else ():
        words = _command(pid).split(b"\0")
        for word, following in pairwise(words):
            name, _, value = word.partition(b"=")
            if name not in _HOSTFILE:
                continue
            hostfile = os.fsdecode(value or following)
            with suppress(OSError):  # of a launcher that has ended
                hostfile = os.path.join(os.readlink(f"/proc/{pid}/cwd"), hostfile)
            if not os.path.isfile(hostfile):
                raise UserError(
                    f"deepspeed --hostfile: {hostfile} is no file, so that deepspeed has started ranks on this host "
                    "alone; rule: the file is there until the ranks have started, or leave --hostfile out"
                )


def _watch(launchers: dict[int, str]) -> None:
    while all(_start_of_live(pid) == start for pid, start in launchers.items()):
        time.sleep(LOOK)
    os.kill(os.getpid(), signal.SIGTERM)


def _launchers() -> dict[int, str]:
    """Return the launchers above this process, with the times at which they have started."""
    found = _launchers_from(os.getppid())
    client = _ssh_client() if found else None
    if client is not None:
        found |= _launchers_from(client, past_shells=False)
    return {pid: start for pid, start in found.items() if start}


def _launchers_from(pid: int, *, past_shells: bool = True) -> dict[int, str]:
    """Return a process and those right above it, as far as they are launchers, or the shells of an ssh server."""
    found: dict[int, str] = {}
    for _ in range(_LEVELS):
        command = _command(pid)
        if not any(name in command for name in _LAUNCHERS) and not (
            found and command.rstrip(b"\0").endswith(_OVER_SSH)
        ):
            break
        if not past_shells and os.path.basename(command.partition(b"\0")[0]).lstrip(b"-") in _SHELLS:
            break
        found[pid] = _start_of_live(pid)
        pid = int(_status(pid)[1] or 0)
    return found


def _ssh_client() -> int | None:
    """Return the process of this host by whose ssh connection this process was started, None where there is none."""
    with suppress(OSError, ValueError):
        client, client_port, server, server_port = os.environ.get("SSH_CONNECTION", "").split()
        inode = _socket((_address(client), int(client_port)), (_address(server), int(server_port)))
        for link in Path("/proc").glob("[0-9]*/fd/*") if inode else ():
            with suppress(OSError):  # of another user's process, or of one that ends
                if os.readlink(link) == f"socket:[{inode}]":
                    return int(link.parts[2])
    return None


def _socket(own: tuple[str, int], other: tuple[str, int]) -> str | None:
    """Return the inode of a TCP socket of this host, by the addresses and ports of its own end and the other one."""
    for table in ("tcp", "tcp6"):
        with suppress(OSError):  # a host without IPv6
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                _, here, there, *rest = line.split()
                if _end(here) == own and _end(there) == other:
                    return rest[6]
    return None


def _end(text: str) -> tuple[str, int]:
    """Return the address and the port of one end of a connection, as the kernel writes them: 0100007F:1F90."""
    address, _, port = text.partition(":")
    words = (bytes.fromhex(address[first : first + 8]) for first in range(0, len(address), 8))
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    kind = IPv4Address if len(packed) == 4 else IPv6Address
    return _address(str(kind(packed))), int(port, 16)


def _address(text: str) -> str:
    """Return an address in its one form: an IPv4 address that is written as IPv6 is the IPv4 address."""
    address = ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


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
