"""The meeting of all ranks at MASTER_ADDR and MASTER_PORT, before torch's: no rank waits for what cannot come.

Rank 0 listens at the port. Every other rank connects and names itself, and hears at once that it is at the right place;
another program at the port does not answer so. When all ranks have come, rank 0 tells each to go on, and torch's store
takes over the port. Where two ranks contradict each other, rank 0 tells all of them. The connections stay: see
`engine.contact`.
"""

import errno
import os
import select
import socket
import time
from collections.abc import Generator
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from cosmos_scale.engine.contact import Contact, Peer, read_line
from cosmos_scale.engine.rank_variables import RankVariables, WrongRankVariable
from cosmos_scale.errors import UserError

WAIT = 1800.0  # seconds in which all ranks must come, as long as torch waits for a collective
ANSWER = 30.0  # seconds in which rank 0 answers a rank that has connected
GREETS = 1.0  # seconds in which a visitor that has begun its greeting ends it: short, since the others wait meanwhile
PAUSE = 0.5  # seconds between two tries to connect
GREETING, WELCOME, GO, REFUSED = "cosmos-scale rank ", "cosmos-scale welcome to ", "go", "refused: "


def meet(place: RankVariables, wait: float = WAIT, answer: float = ANSWER) -> "tuple[dist.Store, Contact]":  # type: ignore[name-defined]
    """Meet all ranks, and return the store that they share, and the contact to them.

    wait, answer: seconds for all ranks to come, and for rank 0 to answer one. Raises UserError where the port belongs
    to another program, ranks contradict each other, or some do not come.
    """
    if place.rank > 0:
        contact = _visit(place, wait, answer)
        return _store(place, None), contact
    with _listen(place) as listener:
        here = _receive(place, listener, wait)
        store = _store(place, listener.detach())
    _tell(here, GO)  # now the store answers at the port
    return store, Contact(0, here)


def meet_at_agent(place: RankVariables, wait: float = WAIT, answer: float = ANSWER) -> Contact:
    """Meet the ranks of a torchrun, whose agent has the port and the store; returns the contact to them.

    wait, answer: as for `meet`; the agent listens before it starts ranks, so `answer` is what it gets too. Raises
    WrongRankVariable where nothing listens at the port: the variables are of a launch that has ended.
    """
    try:
        _connected(place, answer).close()
    except WrongRankVariable as error:
        raise WrongRankVariable(
            f"TORCHELASTIC_USE_AGENT_STORE: True, but no torchrun answers at {place.address}:{place.port}; rule: start "
            "ranks by torchrun, or unset the variables that it has left"
        ) from error
    store = dist.TCPStore(place.address, place.port, timeout=timedelta(seconds=wait))  # type: ignore[attr-defined]
    key = f"cosmos-scale port {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if place.rank > 0:
        return _visit(place._replace(port=int(store.get(key))), wait, answer)
    with _listen(place._replace(port=0)) as listener:
        store.set(key, str(listener.getsockname()[1]))
        here = _receive(place, listener, wait)
    _tell(here, GO)
    return Contact(0, here)


def _store(place: RankVariables, listener: int | None) -> "dist.Store":  # type: ignore[name-defined]
    return dist.TCPStore(  # type: ignore[attr-defined]
        place.address,
        place.port,
        place.world_size,
        is_master=place.rank == 0,
        timeout=timedelta(seconds=WAIT),
        wait_for_workers=False,
        master_listen_fd=listener,
    )


def _listen(place: RankVariables) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", place.port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=4096
        )
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        what = "is taken by another program on this host" if taken else f"cannot be listened at ({error.strerror})"
        raise WrongRankVariable(
            f"MASTER_PORT: {place.port} {what}; rule: a free port (deepspeed --master_port, torchrun --master_port)"
        ) from error


def _receive(place: RankVariables, listener: socket.socket, wait: float) -> dict[int, Peer]:
    """Wait for all other ranks, and return them; tell all of them where something is wrong."""
    here: dict[int, Peer] = {}
    visitors = _speaking_visitors(listener, wait)
    while len(here) < place.world_size - 1:
        visitor = next(visitors)
        named = None if visitor is None else _named(visitor)
        if visitor is None:
            missing = sorted({*range(1, place.world_size)} - here.keys())
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            _refuse(here, f"ranks {shown} have not come within {wait:g} s; rule: every rank of WORLD_SIZE starts")
        elif named is None:  # a stranger
            visitor.close()
        else:
            rank, world_size, host = named
            twice = rank in here or rank == 0
            here[-1 if twice else rank] = Peer(rank, host, visitor)
            if world_size != place.world_size:
                _refuse(
                    here, f"WORLD_SIZE: rank {rank} has {world_size}, rank 0 has {place.world_size}; rule: all agree"
                )
            if twice:
                _refuse(here, f"RANK: two processes have {rank}; rule: each rank has its own number")
    visitors.close()
    return here


def _speaking_visitors(listener: socket.socket, wait: float) -> Generator[socket.socket | None, None, None]:
    """Yield who connects and says something, and None after some seconds; who says nothing keeps nobody waiting."""
    deadline = time.monotonic() + wait
    silent: dict[int, socket.socket] = {}
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    try:
        while (left := deadline - time.monotonic()) > 0:
            for number, _ in poll.poll(1000 * left):
                if number == listener.fileno():
                    visitor, _ = listener.accept()
                    silent[visitor.fileno()] = visitor
                    poll.register(visitor, select.POLLIN)
                else:
                    poll.unregister(number)
                    yield silent.pop(number)
        yield None
    finally:
        for visitor in silent.values():
            visitor.close()


def _named(visitor: socket.socket) -> tuple[int, int, str] | None:
    """Welcome a visitor, and return its rank, its world size and its host; None where it is no rank."""
    try:
        line = read_line(visitor, GREETS)
        if not line.startswith(GREETING):
            return None
        rank, world_size, host = line.removeprefix(GREETING).split()
        named = int(rank), int(world_size), host
        if not 0 <= named[0] < named[1]:
            return None
        visitor.sendall(f"{WELCOME}{socket.gethostname()}\n".encode())
    except (OSError, ValueError):
        return None
    return named


def _refuse(here: dict[int, Peer], text: str) -> NoReturn:
    _tell(here, f"{REFUSED}{text}")
    raise UserError(text)


def _tell(here: dict[int, Peer], line: str) -> None:
    for visitor in here.values():
        with suppress(OSError):  # of a rank that has ended
            visitor.connection.sendall(f"{line}\n".encode())


def _visit(place: RankVariables, wait: float, answer: float) -> Contact:
    """Name this rank to rank 0, wait until all have come, and return the contact to rank 0."""
    where = f"{place.address}:{place.port}"
    host = _connected(place, wait)
    said = ""
    with suppress(OSError):
        host.sendall(f"{GREETING}{place.rank} {place.world_size} {socket.gethostname()}\n".encode())
        said = read_line(host, answer)
    if not said.startswith(WELCOME):
        raise WrongRankVariable(
            f"MASTER_PORT: what listens at {where} is not rank 0 of this launch; rule: a free port of rank 0's "
            "host (deepspeed --master_port, torchrun --master_port)"
        )
    first = Peer(0, said.removeprefix(WELCOME), host)
    said = ""
    with suppress(OSError):
        said = read_line(host, wait + answer)
    if said.startswith(REFUSED):
        raise UserError(said.removeprefix(REFUSED))
    if said != GO:
        raise UserError(f"rank 0, at {where}, ended before all ranks had come; its own output says why")
    return Contact(place.rank, {0: first})


def _connected(place: RankVariables, wait: float) -> socket.socket:
    deadline = time.monotonic() + wait
    while True:
        try:
            connection = socket.create_connection((place.address, place.port), timeout=10.0)
            if connection.getsockname() != connection.getpeername():
                return connection
            # On rank 0's host a try before rank 0 listens may get this very port as its own, and reach itself.
            connection.close()
            time.sleep(PAUSE)
        except OSError as error:
            if time.monotonic() > deadline:
                raise WrongRankVariable(
                    f"MASTER_ADDR: rank 0 does not answer at {place.address}:{place.port} ({error.strerror or error}); "
                    "rule: the name or address of rank 0's host"
                ) from error
            time.sleep(PAUSE)
