"""Pictures prepared by threads while the model computes, block by block."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.host import ranks_of_this_host, usable_cores

Prepared = TypeVar("Prepared")

_BLOCKS_AHEAD = 2  # blocks in memory: the one that the model sees, and the next


def prepared_blocks(
    begin: Callable[[int], Callable[[], Prepared]], places: range, block: int, world_size: int
) -> Iterator[list[tuple[int, Prepared | DamagedSample]]]:
    """Yield all places in order, `block` at a time, each with what was prepared for it, or with what is wrong with it.

    begin: called in the caller's thread, place after place; a thread of the pool runs what it returns. Decoding and
    resizing leave Python's lock. DamagedSample of both becomes a result; anything else passes through.
    """
    pool = ThreadPoolExecutor(max(1, usable_cores() // ranks_of_this_host(unknown=world_size)))
    waiting = iter(places)
    under_way: deque[Future[Prepared | DamagedSample]] = deque()
    try:
        for first in range(0, len(places), block):
            under_way.extend(
                _started(begin, place, pool) for place in islice(waiting, _BLOCKS_AHEAD * block - len(under_way))
            )
            yield [(place, under_way.popleft().result()) for place in places[first : first + block]]
    finally:
        pool.shutdown(cancel_futures=True)


def _started(
    begin: Callable[[int], Callable[[], Prepared]], place: int, pool: ThreadPoolExecutor
) -> "Future[Prepared | DamagedSample]":
    try:
        prepare = begin(place)
    except DamagedSample as damage:
        found: Future[Prepared | DamagedSample] = Future()
        found.set_result(damage)
        return found
    return pool.submit(_or_damage, prepare)


def _or_damage(prepare: Callable[[], Prepared]) -> Prepared | DamagedSample:
    try:
        return prepare()
    except DamagedSample as damage:
        return damage
