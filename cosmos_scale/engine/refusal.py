"""A rank that is refused on its host alone, before all ranks meet: it tells the others, which would wait for it.

Rank 0 listens at the ranks' port and tells who comes; any other rank tells rank 0. Nothing slow is imported here.
"""

import socket
import threading
import time
from contextlib import suppress

from cosmos_scale.engine.contact import GREETING, LONGEST_LINE, REFUSAL, REFUSED, WELCOME, read_line
from cosmos_scale.engine.rank_variables import RankVariables

TELLS_FOR = 20.0  # seconds: ranks of other hosts import their parts first
PAUSE = 0.5  # seconds between two tries to connect
HEARD_WITHIN = 1.0  # seconds in which who has connected says who it is


def tell_refusal(place: RankVariables, text: str, ranks_here: int, seconds: float = TELLS_FOR) -> threading.Thread:
    """Tell the ranks of other hosts why this rank does not come, from a thread that ends after some seconds at most.

    ranks_here: of this host, none of which comes.
    """
    said = f"rank {place.rank} on host {socket.gethostname()}: {text}".replace("\n", " ")
    said = said.encode()[: LONGEST_LINE // 2].decode(errors="ignore")
    until = time.monotonic() + seconds
    if place.rank > 0:
        thread = threading.Thread(target=_tell_rank_0, args=(place, said, until))
    else:
        thread = threading.Thread(target=_tell_who_comes, args=(place, said, ranks_here, until))
    thread.start()
    return thread


def _tell_rank_0(place: RankVariables, said: str, until: float) -> None:
    while time.monotonic() < until:
        with suppress(OSError), socket.create_connection((place.address, place.port), timeout=5.0) as connection:
            if connection.getsockname() != connection.getpeername():  # else the connection has reached itself
                connection.sendall(f"{REFUSAL}{said}\n".encode())
                return
        time.sleep(PAUSE)


def _tell_who_comes(place: RankVariables, said: str, ranks_here: int, until: float) -> None:
    left, dual = place.world_size - ranks_here, socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with (
        suppress(OSError),
        socket.create_server(("", place.port), family=family, dualstack_ipv6=dual, backlog=4096) as listener,
    ):
        while left > 0 and time.monotonic() < until:
            listener.settimeout(max(0.01, until - time.monotonic()))
            visitor, _ = listener.accept()
            with visitor, suppress(OSError):
                line = read_line(visitor, HEARD_WITHIN)
                if line.startswith(GREETING):
                    visitor.sendall(f"{WELCOME}{socket.gethostname()}\n{REFUSED}{said}\n".encode())
                    left -= 1
                elif line.startswith(REFUSAL):  # of one rank, for all ranks of a host, which has as many as this one
                    left -= ranks_here
