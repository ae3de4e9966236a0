"""How much memory a call needs, counted by torch's own allocator."""

import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

from torch.autograd.profiler import profile

Result = TypeVar("Result")


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes of CPU tensors that `call` holds at one time beside what it was given.

    What `call` returns counts too. Every allocation and release is recorded, also inside operations and in autograd's
    backward. So the number is the same in every run and on every machine, unlike a process's resident memory.
    """
    with profile(profile_memory=True) as recorded:
        result = call()
    del result  # held until here
    held = peak = 0
    for nbytes in _changes(recorded):
        held += nbytes
        peak = max(peak, held)
    return peak


def held_bytes(call: Callable[[], Result]) -> tuple[Result, int]:
    """Return what `call` returns, and how many more bytes of CPU tensors are held after it, those of its graph too."""
    gc.collect()
    with profile(profile_memory=True) as recorded:
        result = call()
        gc.collect()  # else the time of a collection would decide whether cycles of it count
    return result, sum(_changes(recorded))


def _changes(recorded: profile) -> Iterator[int]:
    """Yield the bytes allocated (positive) and released (negative), in the order of time."""
    assert recorded.kineto_results is not None
    changes: list[tuple[int, int]] = [
        (event.start_ns(), event.nbytes())  # type: ignore[attr-defined]
        for event in recorded.kineto_results.events()
        if event.name() == "[memory]"
    ]
    return (nbytes for _, nbytes in sorted(changes, key=lambda change: change[0]))
