"""Batches fetched ahead: the time waited for them, and ranks that hear of each other's failures."""

import signal
import time
from collections.abc import Iterator

import pytest
import torch
from torch import distributed as dist

from cosmos_scale.batch import Batch
from cosmos_scale.engine.collectives import lost_contact, start_ranks
from cosmos_scale.engine.lookahead import Lookahead, StopRequest
from cosmos_scale.errors import UserError
from tests.distributed import run_ranks
from tests.engine.tiny import tiny_batch


def test_waits_are_counted_once_where_they_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def batches() -> Iterator[Batch]:
        for seconds in (3.0, 5.0):
            clock[0] += seconds
            yield tiny_batch(0)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    ahead = Lookahead(batches(), start_ranks("cpu"), StopRequest(None))
    ahead.fetch()
    ahead.take()
    ahead.fetch()
    assert ahead.waited() == 8.0
    ahead.take()
    assert ahead.waited() == 0.0


def second_batch_fails(rank: int, world_size: int) -> tuple[int, str]:
    def batches() -> Iterator[Batch]:
        yield tiny_batch(0)
        if rank == 1:
            raise UserError("shard x: is gone; rule: it must stay")
        yield tiny_batch(1)

    ahead = Lookahead(batches(), start_ranks("cpu"), StopRequest(None))
    taken = 0
    try:
        while True:
            ahead.fetch()
            ahead.take()
            taken += 1
    except UserError as error:
        return taken, str(error)


def test_every_rank_hears_of_a_failure_before_the_step() -> None:
    assert run_ranks(second_batch_fails, 2) == [(1, "shard x: is gone; rule: it must stay (rank 1)")] * 2


def stops_on_one_rank(rank: int, world_size: int) -> list[bool]:
    stop = StopRequest(max_minutes=1e-9 if rank == 1 else None)
    time.sleep(1e-3)
    ahead = Lookahead(iter([tiny_batch(0)]), start_ranks("cpu"), stop)
    ahead.fetch()
    return [ahead.take()[1]]


def test_all_ranks_stop_where_one_wants_to() -> None:
    assert run_ranks(stops_on_one_rank, 2) == [[True], [True]]


def test_two_interrupts_at_once_stop_and_a_later_one_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with StopRequest(None) as stop:
        before = stop.wanted
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert (before, stop.wanted) == (False, True)
        clock[0] = 2.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def peer_leaves(rank: int, world_size: int) -> bool:
    if rank == 1:
        dist.destroy_process_group()
        return True
    try:
        for _ in range(100):
            dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        return lost_contact(error)
    return False


def test_an_ended_rank_is_recognised_as_such() -> None:
    assert run_ranks(peer_leaves, 2) == [True, True]
    assert not lost_contact(RuntimeError("shapes do not fit"))
    assert not lost_contact(ValueError("gloo"))
