"""What a launcher's environment says of a rank: read and checked before anything slow or collective."""

import os
import re
import socket
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.errors import UserError

MOST_RANKS = 1_000_000  # DeepSpeed and torch read such numbers into 32 bits

INTERFACES = Path("/sys/class/net")  # what Linux says of each network interface
IS_UP = 1  # IFF_UP of linux/if.h
DOWN = ("down", "lowerlayerdown", "notpresent")  # of the states by RFC 2863, as Linux writes them

ONE_PROCESS = "to train in one process, unset RANK, WORLD_SIZE and LOCAL_RANK"


class WrongRankVariable(UserError):
    """A variable of the environment that cannot be; only this rank may know of it, so each rank prints its own."""


class RankVariables(NamedTuple):
    """A rank's place among all ranks and on its host, and where rank 0 is to be met."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int


def read_rank_variables() -> RankVariables | None:
    """Return what a launcher has set; None where it has set nothing, for one process alone.

    Raises WrongRankVariable where variables are half set, no numbers, or contradict each other.
    """
    _check_ranks_here()
    _check_interfaces()
    if "RANK" not in os.environ:
        for name, alone in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
            if name in os.environ and _number(name) != alone:
                raise WrongRankVariable(
                    f"{name}: {os.environ[name]}, but RANK is not set; rule: a launcher sets both; {ONE_PROCESS}"
                )
        return None
    world_size = _number("WORLD_SIZE", least=1)
    rank = _below("RANK", world_size, "WORLD_SIZE")
    local_rank = _below("LOCAL_RANK", world_size, "WORLD_SIZE")
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in os.environ:
            _below("LOCAL_RANK", _number(name), name)
    address = _text("MASTER_ADDR")
    port = _number("MASTER_PORT", least=1, most=65535)
    _check_resolves(address, port)
    return RankVariables(rank, world_size, local_rank, address, port)


class _Launcher(NamedTuple):
    """The variables by which a launcher that does not set RANK says a rank's place. how: to set what it leaves out."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_size: str
    how: str


_MPI = "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 (Open MPI), or -genv (MPICH)"
_OTHER_LAUNCHERS = (
    # Only srun sets the number of a step's tasks: a batch script itself, and a login on a node, are no ranks.
    _Launcher(
        "srun",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",
        'before srun, export MASTER_PORT=29500 MASTER_ADDR=$(scontrol show hostnames "$SLURM_NODELIST" | head -n 1)',
    ),
    _Launcher(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        _MPI,
    ),
    _Launcher("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", _MPI),
)


def adopt_rank_variables() -> None:
    """Where RANK is missing, set it and its like from what srun or mpirun has set; one task alone stays one process.

    Raises WrongRankVariable where srun or mpirun has set only some of what a rank needs, or WORLD_SIZE contradicts.
    """
    launcher = next((one for one in _OTHER_LAUNCHERS if one.world_size in os.environ), None)
    if "RANK" in os.environ or launcher is None or _number(launcher.world_size, least=1) == 1:
        return
    for name in (launcher.rank, launcher.local_rank):
        if name not in os.environ:
            raise WrongRankVariable(
                f"{name}: is not set, but {launcher.world_size} is; rule: {launcher.name} sets both, or set RANK, "
                "WORLD_SIZE and LOCAL_RANK"
            )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise WrongRankVariable(f"{name}: is not set, but {launcher.rank} is; rule: {launcher.how}")
    world_size = os.environ[launcher.world_size]
    if os.environ.get("WORLD_SIZE", world_size) != world_size:
        raise WrongRankVariable(
            f"WORLD_SIZE: {os.environ['WORLD_SIZE']}, but {launcher.world_size} is {world_size}; rule: unset WORLD_SIZE"
        )
    os.environ |= {"RANK": os.environ[launcher.rank], "WORLD_SIZE": world_size}
    os.environ.setdefault("LOCAL_RANK", os.environ[launcher.local_rank])
    local_size = _ranks_of_node(os.environ.get(launcher.local_size, ""))
    if local_size:
        os.environ.setdefault("LOCAL_WORLD_SIZE", local_size)
        os.environ.setdefault("LOCAL_SIZE", local_size)  # DeepSpeed's name


def _ranks_of_node(text: str) -> str:
    """Return the number for this node of a list as Slurm writes it, 8(x3),4; empty where that cannot be told."""
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(\(x([0-9]{1,6})\))?", part)
        if match is None:
            return ""
        numbers += [match[1]] * int(match[3] or 1)
    node = os.environ.get("SLURM_NODEID", "0")
    return numbers[int(node)] if node.isdecimal() and int(node) < len(numbers) else ""


def _check_ranks_here() -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in os.environ:
            _number(name, least=1)


def check_nccl_interfaces() -> None:
    """Look at the network interfaces that NCCL is told to take: by prefixes, = by whole names, ^ all others.

    Raises WrongRankVariable where there is none that is up.
    """
    named = os.environ.get("NCCL_SOCKET_IFNAME", "")
    names = [name.partition(":")[0] for name in named.removeprefix("^").removeprefix("=").split(",") if name]
    is_whole = named.removeprefix("^").startswith("=")
    here = [name for _, name in socket.if_nameindex()]
    chosen = [one for one in here if any(one == name or (not is_whole and one.startswith(name)) for name in names)]
    if named.startswith("^"):
        chosen = [one for one in here if one not in chosen]
    if names and not any(map(_is_up, chosen)):
        what = f"is down ({', '.join(chosen)})" if chosen else "means no network interface of this host"
        raise WrongRankVariable(f"NCCL_SOCKET_IFNAME: {named!r} {what}; {_interface_rule()}")


def _check_interfaces() -> None:
    """Look at the network interfaces that gloo is told to take, also by a process alone; it heeds no single letter."""
    named, here = os.environ.get("GLOO_SOCKET_IFNAME", ""), [name for _, name in socket.if_nameindex()]
    for name in named.split(",") if len(named) > 1 else ():
        if name not in here:
            raise WrongRankVariable(
                f"GLOO_SOCKET_IFNAME: {name!r} is no network interface of this host; {_interface_rule()}"
            )
        if not _is_up(name):
            raise WrongRankVariable(f"GLOO_SOCKET_IFNAME: {name!r} is down; {_interface_rule()}")


def _interface_rule() -> str:
    up = [name for _, name in socket.if_nameindex() if _is_up(name)]
    return f"rule: of {', '.join(up)}, or unset"


def _is_up(interface: str) -> bool:
    """Whether a network interface is up, as far as the system says."""
    try:
        flags = int((INTERFACES / interface / "flags").read_text(), 16)
        return bool(flags & IS_UP) and (INTERFACES / interface / "operstate").read_text().strip() not in DOWN
    except (OSError, ValueError):
        return True


def _number(name: str, least: int = 0, most: int | None = None) -> int:
    text = _text(name)
    is_number = text.isascii() and text.isdecimal()
    number = int(text[:20]) if is_number else -1  # Python refuses to read thousands of digits
    if least <= number <= (MOST_RANKS if most is None else most):
        return number
    limits = f"from {least} to {most}" if most is not None else f"of at least {least}"
    if most is None and number > MOST_RANKS:
        limits = f"of at most {MOST_RANKS}"
    raise WrongRankVariable(f"{name}: {text[:80]!r}; rule: a whole number {limits}")


def _below(name: str, limit: int, of: str) -> int:
    number = _number(name)
    if number >= limit:
        raise WrongRankVariable(f"{name}: {number}, but {of} is {limit}; rule: ranks are numbered from 0")
    return number


def _text(name: str) -> str:
    text = os.environ.get(name)
    if text is None:
        hint = " (under SLURM: LOCAL_RANK=$SLURM_LOCALID)" if name == "LOCAL_RANK" else ""
        raise WrongRankVariable(f"{name}: is not set, but RANK is; rule: a launcher sets both{hint}; {ONE_PROCESS}")
    if not text:
        raise WrongRankVariable(f"{name}: is set to nothing; rule: it has a value, or is unset")
    return text


def _check_resolves(address: str, port: int) -> None:
    try:
        socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WrongRankVariable(
            f"MASTER_ADDR: {address!r} cannot be resolved here ({reason}); rule: the name or address of rank 0's host"
        ) from error
