"""A refusal before all ranks have met: whoever knows of it tells the ranks that would wait for one that never comes.

A rank that is refused on its host alone tells rank 0, which tells all. Where rank 0 is refused, it listens at the
ranks' port and tells who comes. Nothing slow is imported here.
"""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from cosmos_scale.engine.contact import GREETING, LONGEST_LINE, REFUSAL, REFUSED, WELCOME, read_line
from cosmos_scale.engine.rank_variables import RankVariables
from cosmos_scale.engine.visitors import Visitors

TELLS_FOR = 20.0  # seconds: ranks of other hosts import their parts first
PAUSE = 0.5  # seconds between two tries to connect
GREETS = 1.0  # seconds in which a visitor that has begun its line ends it: short, since the others wait meanwhile


def tell_refusal(place: RankVariables, text: str, ranks_here: int, seconds: float = TELLS_FOR) -> threading.Thread:
    """Tell the ranks of other hosts why this rank does not come, from a thread that ends after some seconds at most.

    ranks_here: of this host, none of which comes.
    """
    said = f"rank {place.rank} on host {socket.gethostname()}: {text}"
    until = time.monotonic() + seconds
    if place.rank > 0:
        return _start(_tell_rank_0, place, f"{REFUSAL}{ranks_here} {_one_line(said)}", until)
    return _start(_tell_at_port, place, said, place.world_size - ranks_here, until)


def tell_later(visitors: Visitors, text: str, ranks: int) -> threading.Thread:
    """Tell a refusal to the ranks that rank 0 has not heard before, from a thread that ends after some seconds at most.

    visitors: of rank 0's port; the thread closes them. ranks: so many have yet to come.
    """
    return _start(_tell_who_comes, visitors, text, ranks, time.monotonic() + TELLS_FOR)


def read_refusal(line: str) -> tuple[int, str]:
    """Return how many ranks of a host do not come, and why, from the line of one of them."""
    ranks, _, text = line.removeprefix(REFUSAL).partition(" ")
    return int(ranks) if ranks.isdecimal() else 1, text


def _start(run: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=run, args=arguments)
    thread.start()
    return thread


def _one_line(text: str) -> str:
    return text.replace("\n", " ").encode()[: LONGEST_LINE // 2].decode(errors="ignore")


def _tell_rank_0(place: RankVariables, line: str, until: float) -> None:
    while time.monotonic() < until:
        with suppress(OSError), socket.create_connection((place.address, place.port), timeout=5.0) as connection:
            if connection.getsockname() != connection.getpeername():  # else the connection has reached itself
                connection.sendall(f"{line}\n".encode())
                return
        time.sleep(PAUSE)


def _tell_at_port(place: RankVariables, text: str, ranks: int, until: float) -> None:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with (
        suppress(OSError),
        socket.create_server(("", place.port), family=family, dualstack_ipv6=dual, backlog=4096) as listener,
    ):
        _tell_who_comes(Visitors(listener), text, ranks, until)


def _tell_who_comes(visitors: Visitors, text: str, ranks: int, until: float) -> None:
    answer = f"{WELCOME}{socket.gethostname()}\n{REFUSED}{_one_line(text)}\n".encode()
    while ranks > 0 and (visitor := visitors.next(until)) is not None:
        with visitor, suppress(OSError):
            line = read_line(visitor, GREETS)
            if line.startswith(GREETING):
                visitor.sendall(answer)
                ranks -= 1
            elif line.startswith(REFUSAL):
                ranks -= read_refusal(line)[0]
    visitors.close()
