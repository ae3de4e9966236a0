"""The meeting of ranks: all come, or each of them hears why not, within seconds."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import torch.distributed as dist

from cosmos_scale.engine.meeting import meet, meet_at_agent
from cosmos_scale.engine.rank_variables import RankVariables
from cosmos_scale.engine.ranks import free_port
from cosmos_scale.errors import UserError

SECONDS = 20.0  # for what takes one at most


def place(rank: int, world_size: int, port: int) -> RankVariables:
    return RankVariables(rank, world_size, rank, "127.0.0.1", port)


def said(places: list[RankVariables], wait: float = SECONDS, answer: float = 1.0) -> list[str]:
    """What each rank says: the value that rank 0 put into the store, or the refusal."""

    def one(own: RankVariables) -> str:
        try:
            store, _ = meet(own, wait, answer)
        except UserError as error:
            return str(error)
        if own.rank == 0:
            store.set("key", "value")
        found: bytes = store.get("key")
        store.add("read", 1)
        while own.rank == 0 and store.add("read", 0) < own.world_size:  # rank 0 holds the store
            time.sleep(0.01)
        return found.decode()

    with ThreadPoolExecutor(len(places)) as pool:
        futures: list[Future[str]] = [pool.submit(one, own) for own in places]
        return [future.result(3 * SECONDS) for future in futures]


@contextmanager
def stranger(serve: Callable[[socket.socket], object]) -> Iterator[int]:
    """Another program at a port: its number."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def run() -> None:
            while True:
                try:
                    visitor, _ = server.accept()
                except OSError:
                    return
                kept.append(visitor)
                serve(visitor)

        threading.Thread(target=run, daemon=True).start()
        yield server.getsockname()[1]
        for visitor in kept:
            visitor.close()


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_ranks_share_a_store_at_the_port(world_size: int) -> None:
    port = free_port()
    assert said([place(rank, world_size, port) for rank in reversed(range(world_size))]) == ["value"] * world_size


def test_the_port_is_free_again_at_once() -> None:
    port = free_port()
    for _ in range(2):
        assert said([place(0, 2, port), place(1, 2, port)]) == ["value", "value"]


SERVERS: dict[str, Callable[[socket.socket], object]] = {
    "silent": lambda visitor: None,
    "closing": lambda visitor: visitor.close(),
    "web": lambda visitor: visitor.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "endless": lambda visitor: visitor.sendall(b"x" * 5000),
}


@pytest.mark.parametrize("serve", SERVERS.values(), ids=SERVERS)
def test_a_taken_port_is_told_on_every_rank(serve: Callable[[socket.socket], object]) -> None:
    with stranger(serve) as port:
        first, *others = said([place(rank, 3, port) for rank in range(3)])
    assert first.startswith(f"MASTER_PORT: {port} is taken by another program on this host; rule: a free port")
    for other in others:
        assert other.startswith(f"MASTER_PORT: what listens at 127.0.0.1:{port} is not rank 0 of this launch; rule: ")


def test_ranks_that_contradict_each_other_all_hear_it() -> None:
    port = free_port()
    assert (
        said([place(0, 2, port), place(1, 3, port)]) == ["WORLD_SIZE: rank 1 has 3, rank 0 has 2; rule: all agree"] * 2
    )
    port = free_port()
    twice = said([place(0, 3, port), place(1, 3, port), place(1, 3, port)])
    assert twice == ["RANK: two processes have 1; rule: each rank has its own number"] * 3


def test_ranks_that_do_not_come_are_named() -> None:
    port = free_port()
    text = "ranks 2, 3 have not come within 1 s; rule: every rank of WORLD_SIZE starts"
    assert said([place(0, 4, port), place(1, 4, port)], wait=1.0) == [text, text]


def test_a_rank_without_a_first_one_is_told_where_it_looked() -> None:
    (text,) = said([place(1, 2, free_port())], wait=0.5)
    assert text.startswith("MASTER_ADDR: rank 0 does not answer at 127.0.0.1:")


def test_strangers_at_the_door_disturb_nobody() -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        ranks = pool.submit(said, [place(0, 2, port)])
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"\n", b"cosmos-scale rank one\n", b""):
            with connected(port) as visitor:
                visitor.sendall(words)
        assert said([place(1, 2, port)]) == ["value"]
        assert ranks.result(SECONDS) == ["value"]


STRANGERS = {
    "silent": b"",
    "rank -1": b"cosmos-scale rank -1 2 x\n",
    "rank 2": b"cosmos-scale rank 2 2 x\n",
    "bare": b"1 2 x\n",
}


@pytest.mark.parametrize("words", STRANGERS.values(), ids=STRANGERS)
def test_many_strangers_that_stay_keep_nobody_waiting(words: bytes) -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as pool, ExitStack() as strangers:
        ranks = pool.submit(said, [place(0, 2, port)])
        for _ in range(20):
            strangers.enter_context(connected(port)).sendall(words)
        assert said([place(1, 2, port)], answer=SECONDS) == ["value"]
        assert ranks.result(SECONDS) == ["value"]


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        else:
            break
    with connection:
        yield connection


def test_a_torchrun_that_has_ended_is_named() -> None:
    """Its variables may outlive it; torch alone would wait for half an hour."""
    with pytest.raises(
        UserError, match=r"^TORCHELASTIC_USE_AGENT_STORE: True, but no torchrun answers at 127\.0\.0\.1:"
    ):
        meet_at_agent(place(0, 1, free_port()), answer=0.1)


def test_ranks_of_a_torchrun_meet_at_a_port_of_their_own() -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    with ThreadPoolExecutor(3) as pool:
        ranks = [pool.submit(meet_at_agent, place(rank, 3, agent.port)) for rank in (2, 1, 0)]
        assert [rank.result(SECONDS).rank for rank in ranks] == [2, 1, 0]
