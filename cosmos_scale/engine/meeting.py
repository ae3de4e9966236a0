"""The meeting of all ranks at MASTER_ADDR and MASTER_PORT, before torch's: no rank waits for what cannot come.

Rank 0 listens at the port. Every other rank connects and names itself, and hears at once that it is at the right place;
another program at the port does not answer so. When all ranks have come, rank 0 tells each to go on, and torch's store
takes over the port. Where two ranks contradict each other, or have other sources or packages, rank 0 tells all of
them: such ranks would hang in a collective, or train a mixture. A rank that is refused before it comes here says so by
`engine.refusal`. The connections stay: see `engine.contact`.
"""

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from cosmos_scale.engine.contact import GO, GREETING, REFUSAL, REFUSED, WELCOME, Contact, Peer, read_line
from cosmos_scale.engine.rank_variables import RankVariables, WrongRankVariable
from cosmos_scale.engine.refusal import GREETS, read_refusal, tell_later
from cosmos_scale.engine.visitors import Visitors
from cosmos_scale.errors import UserError
from cosmos_scale.interfaces import LOOPBACK, interface_of
from cosmos_scale.versions import build_of_this_rank

WAIT = 1800.0  # seconds in which all ranks must come, as long as torch waits for a collective
NOTICE = 30.0  # seconds of waiting after which a rank says for whom it waits, and again after twice as long
ANSWER = 30.0  # seconds in which rank 0 answers a rank that has connected
PAUSE = 0.5  # seconds between two tries to connect
RANK_0 = "cosmos-scale rank 0"  # in the store of a torchrun's agent: the address and port where rank 0 listens
TWICE = -1  # in the place of a rank's number: of the second with one number


def meet(place: RankVariables, wait: float = WAIT, answer: float = ANSWER) -> "tuple[dist.Store, Contact]":  # type: ignore[name-defined]
    """Meet all ranks, and return the store that they share, and the contact to them.

    wait, answer: seconds for all ranks to come, and for rank 0 to answer one. Raises UserError where the port belongs
    to another program, ranks contradict each other, or some do not come.
    """
    if place.rank > 0:
        _, contact = _visit(lambda: place, place, wait, answer)
        return _store(place, None), contact
    with _listen(place) as listener:
        here = _receive(place, listener, wait)
        store = _store(place, listener.detach())
    return store, _send_on(here)  # now the store answers at the port


def meet_at_agent(place: RankVariables, wait: float = WAIT, answer: float = ANSWER) -> "tuple[dist.Store, Contact]":  # type: ignore[name-defined]
    """Meet the ranks of a torchrun, whose agent has the port; return the ranks' store, and the contact to them.

    The agent's store only says where rank 0 listens now. It outlives restarts of ranks, which agents of several hosts
    number differently: the ranks' own store has nothing of earlier ones.

    wait, answer: as for `meet`; the agent listens before it starts ranks, so `answer` is what it gets too. Raises
    WrongRankVariable where nothing listens at the port: the variables are of a launch that has ended.
    """
    try:
        connection, _ = _connected(lambda: place, place.rank, answer)
        with connection:
            own, agents = connection.getsockname()[0], connection.getpeername()[0]
    except WrongRankVariable as error:
        raise WrongRankVariable(
            f"TORCHELASTIC_USE_AGENT_STORE: True, but no torchrun answers at {place.address}:{place.port}; rule: start "
            "ranks by torchrun, or unset the variables that it has left"
        ) from error
    agent = dist.TCPStore(place.address, place.port, timeout=timedelta(seconds=wait))  # type: ignore[attr-defined]

    def of_rank_0() -> RankVariables:
        if not agent.check([RANK_0]):
            raise OSError("it has not said where it listens")
        address, port = agent.get(RANK_0).decode().split()
        return place._replace(address=address, port=int(port))

    if place.rank > 0:
        met, contact = _visit(of_rank_0, place, wait, answer)
        return _store(met, None), contact
    with _listen(place._replace(port=0)) as listener:
        # After restarts rank 0 may be on another host than the agent with the store.
        here = place._replace(address=place.address if own == agents else own, port=listener.getsockname()[1])
        agent.set(RANK_0, f"{here.address} {here.port}")
        peers = _receive(place, listener, wait)
        store = _store(here, listener.detach())
    return store, _send_on(peers)


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
    """Wait for all other ranks, and return them; where something is wrong, tell all of them, also who comes later."""
    here: dict[int, Peer] = {}
    absent = 0  # ranks that a refused one has said not to come
    visitors = Visitors(listener)
    try:
        for visitor in _until_all_are_here(place, here, visitors, wait):
            line = _line(visitor)
            if line.startswith(REFUSAL):
                absent, text = read_refusal(line)
                raise UserError(text)
            _seat(place, here, visitor, line)
    except UserError as refusal:
        _tell(here, f"{REFUSED}{refusal}")
        ranks = place.world_size - 1 - absent - len(here.keys() - {TWICE})
        tell_later(visitors, str(refusal), ranks)
        raise
    visitors.close()
    return here


def _until_all_are_here(
    place: RankVariables, here: Mapping[int, Peer], visitors: Visitors, wait: float
) -> Iterator[socket.socket]:
    """Yield who comes; say now and then for whom rank 0 waits. Raises UserError where some have not come in time."""
    began, notices = time.monotonic(), _notices(wait)
    notice = next(notices)
    while len(here) < place.world_size - 1:
        visitor = visitors.next(began + notice)
        if visitor is not None:
            yield visitor
            continue
        missing = sorted({*range(1, place.world_size)} - here.keys())
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        ranks = f"rank{'s' * (len(missing) > 1)} {shown}"
        if notice >= wait:
            have = "have" if len(missing) > 1 else "has"
            raise UserError(f"{ranks} {have} not come within {wait:g} s; rule: every rank of WORLD_SIZE starts")
        _tell_of_waiting(f"rank 0 has waited {notice:.0f} s for {ranks} of {place.world_size}", wait)
        notice = next(notices)


def _notices(wait: float) -> Iterator[float]:
    """Yield the seconds of waiting after which it is told, and at last `wait`."""
    notice = NOTICE
    while notice < wait:
        yield notice
        notice *= 2
    yield wait


def _tell_of_waiting(text: str, wait: float) -> None:
    with suppress(OSError):  # of a standard error that nobody reads
        print(f"cosmos-scale: {text}; it waits for {wait:g} s in all", file=sys.stderr, flush=True)


def _different(rank: int, host: str, build: dict[str, str], own: dict[str, str]) -> str:
    """Say in which sources and packages a rank differs from rank 0."""
    names = [name for name in sorted(own | build) if build.get(name) != own.get(name)]
    there, here = (", ".join(f"{name} {one.get(name, 'none')}" for name in names) for one in (build, own))
    return (
        f"rank {rank} on host {host} has {there}, rank 0 on host {socket.gethostname()} has {here}; rule: the same "
        "files of cosmos_scale and the same versions of Python and of all packages on each host"
    )


def _seat(place: RankVariables, here: dict[int, Peer], visitor: socket.socket, line: str) -> None:
    """Welcome a visitor who greets as a rank, and add it to who is here; close a stranger's connection.

    Raises UserError where the rank and this one contradict each other.
    """
    named = _named(line)
    if named is None:
        visitor.close()
        return
    rank, world_size, host, build = named
    twice = rank in here or rank == 0
    here[TWICE if twice else rank] = peer = Peer(rank, host, visitor)
    _tell({rank: peer}, f"{WELCOME}{socket.gethostname()}")
    if world_size != place.world_size:
        raise UserError(f"WORLD_SIZE: rank {rank} has {world_size}, rank 0 has {place.world_size}; rule: all agree")
    if twice:
        raise UserError(f"RANK: two processes have {rank}; rule: each rank has its own number")
    if build != (own := build_of_this_rank()):
        raise UserError(_different(rank, host, build, own))


def _line(visitor: socket.socket) -> str:
    with suppress(OSError):
        return read_line(visitor, GREETS)
    return ""


def _named(line: str) -> tuple[int, int, str, dict[str, str]] | None:
    """Return the rank, the world size, the host and the build of a greeting; None where it is none."""
    if not line.startswith(GREETING):
        return None
    try:
        rank, world_size, host, *build = line.removeprefix(GREETING).split(maxsplit=3)
        # A rank of an older version says nothing of its build.
        named = int(rank), int(world_size), host, dict(json.loads(build[0])) if build else {}
    except (ValueError, TypeError):
        return None
    return named if 0 <= named[0] < named[1] else None


def _send_on(here: dict[int, Peer]) -> Contact:
    """Tell all ranks to go on, and the interface by which other hosts have come; return the contact to them."""
    interface = _use_interface([_interface(peer.connection) for peer in here.values()])
    _tell(here, f"{GO} {interface}")
    return Contact(0, here)


def _use_interface(names: Sequence[str]) -> str:
    """Let gloo use the first network interface that leads to other hosts, unless the environment names one; return it.

    Otherwise gloo takes the address of the host's own name, and waits in vain where the name means another one.
    names: of interfaces by which this host's ranks have met others, loopback among them; empty ones are unknown.
    """
    name = next(iter([name for name in names if name not in ("", LOOPBACK)] or filter(None, names)), "")
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    return name


def _interface(connection: socket.socket) -> str:
    return interface_of(connection.getsockname()[0]) or ""


def _tell(here: dict[int, Peer], line: str) -> None:
    for visitor in here.values():
        with suppress(OSError):  # of a rank that has ended
            visitor.connection.sendall(f"{line}\n".encode())


def _visit(
    find: Callable[[], RankVariables], place: RankVariables, wait: float, answer: float
) -> tuple[RankVariables, Contact]:
    """Name this rank to rank 0, wait until all have come, and return where rank 0 is, and the contact to it.

    find: see `_connected`.
    """
    own = f"{place.rank} {place.world_size} {socket.gethostname()} {json.dumps(build_of_this_rank())}"
    host, met = _connected(find, place.rank, wait)
    where = f"{met.address}:{met.port}"
    said = ""
    with suppress(OSError):
        host.sendall(f"{GREETING}{own}\n".encode())
        said = read_line(host, answer)
    if not said.startswith(WELCOME):
        raise WrongRankVariable(
            f"MASTER_PORT: what listens at {where} is not rank 0 of this launch; rule: MASTER_ADDR is rank 0's host, "
            "and the port a free one there (deepspeed --master_port, torchrun --master_port)"
        )
    first = Peer(0, said.removeprefix(WELCOME), host)
    said = ""
    with suppress(OSError):
        said = read_line(host, wait + answer)
    if said.startswith(REFUSED):
        raise UserError(said.removeprefix(REFUSED))
    go, _, interface_of_rank_0 = said.partition(" ")
    if go != GO:
        raise UserError(f"rank 0, at {where}, ended before all ranks had come; its own output says why")
    own_interface = _interface(host)
    # Only a rank of rank 0's host comes over loopback. Ranks of other hosts cannot reach it there.
    _use_interface([own_interface, interface_of_rank_0] if own_interface == LOOPBACK else [own_interface])
    return met, Contact(place.rank, {0: first})


def _connected(find: Callable[[], RankVariables], rank: int, wait: float) -> tuple[socket.socket, RankVariables]:
    """Return a connection to rank 0, and where it is.

    find: tells where rank 0 is, before each try; raises OSError where that is unknown yet.
    """
    began, notices = time.monotonic(), _notices(wait)
    notice = next(notices)
    where = "an address that it has not told yet"
    while True:
        try:
            place = find()
            where = f"{place.address}:{place.port}"
            connection = socket.create_connection((place.address, place.port), timeout=10.0)
            if connection.getsockname() != connection.getpeername():
                return connection, place
            # On rank 0's host a try before rank 0 listens may get this very port as its own, and reach itself.
            connection.close()
            time.sleep(PAUSE)
        except OSError as error:
            waited = time.monotonic() - began
            if waited > wait:
                raise WrongRankVariable(
                    f"MASTER_ADDR: rank 0 does not answer at {where} ({error.strerror or error}); "
                    "rule: the name or address of rank 0's host"
                ) from error
            if waited > notice:
                why = error.strerror or error
                _tell_of_waiting(f"rank {rank} has waited {waited:.0f} s for rank 0 at {where} ({why})", wait)
                notice = next(notices)
            time.sleep(PAUSE)
