"""Batches fetched ahead: the time waited for them, and ranks that hear of each other's failures."""

import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import islice

import pytest
import torch
from torch import distributed as dist

from cosmos_scale.batch import Batch
from cosmos_scale.engine.ranks import lost_contact, start_ranks
from cosmos_scale.errors import JointError, ShardsToGiveUp, UserError
from cosmos_scale.run.lookahead import Lookahead
from cosmos_scale.run.stop_request import StopRequest
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.tiny import tiny_batch


class Batches:
    """A loader whose batches a function makes of (step, the shards given up)."""

    def __init__(self, make: Callable[[int, Mapping[str, int]], Batch]) -> None:
        self.make = make
        self.lost: dict[str, int] = {}
        self.starts: list[int] = []
        self.closed = 0

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        self.starts.append(start_step)
        step = start_step
        try:
            while True:
                yield self.make(step, self.lost)
                step += 1
        finally:
            self.closed += 1

    def lose(self, found: Sequence[Mapping[str, str]], step: int) -> list[str]:
        names = [name for shards in found for name in shards]
        self.lost |= dict.fromkeys(names, step)
        if len(self.lost) > 2:
            raise JointError("too many lost shards")
        return [f"lost {name}" for name in names]


def look_ahead(make: Callable[[int, Mapping[str, int]], Batch], stop: StopRequest, first: int = 0) -> Lookahead:
    return Lookahead(Batches(make), start_ranks("cpu"), stop, print, first=first, last=100, unsaved=bool, enter=str)


def test_waits_are_counted_once_where_they_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def make(step: int, lost: Mapping[str, int]) -> Batch:
        clock[0] += (3.0, 5.0)[step]
        return tiny_batch(0)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    waits = []
    for fetched in islice(look_ahead(make, StopRequest(None)), 2):
        waits.append(fetched.wait_seconds)
        clock[0] += 100.0  # the step's own time
    assert waits == [3.0, 5.0]


def test_the_last_batch_is_that_of_the_last_step() -> None:
    made: list[int] = []

    def make(step: int, lost: Mapping[str, int]) -> Batch:
        made.append(step)
        return tiny_batch(0)

    loader = Batches(make)
    ahead = Lookahead(loader, start_ranks("cpu"), StopRequest(None), print, first=3, last=5, unsaved=bool, enter=str)
    assert len(list(ahead)) == 2
    assert loader.closed == 0  # shutting down loader processes takes time, and the last checkpoint comes first
    assert made == [3, 4]
    assert (
        list(
            Lookahead(
                Batches(make), start_ranks("cpu"), StopRequest(None), print, first=5, last=5, unsaved=bool, enter=str
            )
        )
        == []
    )
    assert made == [3, 4]


def take_until_error(ahead: Lookahead) -> tuple[int, str]:
    taken = sum(1 for _ in ahead)
    assert ahead.failure is not None
    assert next(ahead, None) is None, "no batch comes after the failure"
    return taken, str(ahead.failure)


def second_batch_fails(rank: int, world_size: int) -> tuple[int, str]:
    def make(step: int, lost: Mapping[str, int]) -> Batch:
        if (rank, step) == (1, 1):
            raise UserError("shard x: is gone; rule: it must stay")
        return tiny_batch(step)

    return take_until_error(look_ahead(make, StopRequest(None)))


def test_every_rank_hears_of_a_failure_before_the_step() -> None:
    assert run_ranks(second_batch_fails, 2) == [(1, "shard x: is gone; rule: it must stay (rank 1)")] * 2


def each_rank_loses_shards(rank: int, world_size: int) -> tuple[list[int], list[str], dict[str, int], tuple[int, str]]:
    """At step 6 rank 1 loses a shard and then rank 0 another, at step 8 both the same one."""

    def make(step: int, lost: Mapping[str, int]) -> Batch:
        needs = [(6, 1, "a"), (6, 0, "b"), (8, 0, "c"), (8, 1, "c")]
        for at, who, shard in needs:
            if (step, rank) == (at, who) and shard not in lost and not (shard == "b" and "a" not in lost):
                raise ShardsToGiveUp({shard: "gone"})
        return tiny_batch(step)

    said: list[str] = []
    loader = Batches(make)
    ahead = Lookahead(
        loader, start_ranks("cpu"), StopRequest(None), said.append, first=5, last=100, unsaved=bool, enter=str
    )
    end = take_until_error(ahead)
    return loader.starts, said, loader.lost, end


def test_what_one_rank_loses_all_give_up_from_the_same_step() -> None:
    expected = ([5, 6, 6], ["lost a", "lost b"], {"a": 6, "b": 6, "c": 8}, (3, "too many lost shards"))
    assert run_ranks(each_rank_loses_shards, 2) == [expected] * 2


def stops_on_one_rank(rank: int, world_size: int) -> list[bool]:
    """Rank 1 wants to stop; the second time rank 0 lacks a shard besides, which nobody needs any more."""

    def make(step: int, lost: Mapping[str, int]) -> Batch:
        if (rank, step) == (0, 1):
            raise ShardsToGiveUp({"a": "gone"})
        return tiny_batch(0)

    stopped = []
    for first in (0, 1):
        stop = StopRequest(max_minutes=1e-9 if rank == 1 else None)
        time.sleep(1e-3)
        stopped.append(list(look_ahead(make, stop, first)) == [])
    return stopped


def test_all_ranks_stop_where_one_wants_to() -> None:
    assert run_ranks(stops_on_one_rank, 2) == [[True, True]] * 2


def unsaved_on_one_rank(rank: int, world_size: int) -> list[bool]:
    """Rank 1 says from its second batch on that it could not save."""
    asked = iter([False, rank == 1, False])
    ahead = Lookahead(
        Batches(lambda step, lost: tiny_batch(step)),
        start_ranks("cpu"),
        StopRequest(None),
        print,
        first=0,
        last=3,
        unsaved=lambda: next(asked),
        enter=str,
    )
    return [fetched.unsaved for fetched in ahead]


def test_all_ranks_hear_at_the_next_step_of_what_one_could_not_save() -> None:
    assert run_ranks(unsaved_on_one_rank, 2) == [[False, True, False]] * 2


def test_two_interrupts_at_once_stop_and_a_later_one_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with StopRequest(None) as stop:
        before = stop.reason
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert (before, stop.reason) == (None, signal.SIGINT)
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
