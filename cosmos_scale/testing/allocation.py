"""How much memory a call needs, counted by torch's own allocator."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from torch.autograd.profiler import profile

Result = TypeVar("Result")


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes of CPU tensors that `call` holds at one time beside what it was given.

    What it returns counts. Every allocation and release is recorded, those inside operations and in autograd's backward
    too, so the number is the same on every run and every machine; a process's resident memory depends on both.
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
    """Return what `call` returns, and by how many bytes of CPU tensors more are held after it, its graph's included."""
    with profile(profile_memory=True) as recorded:
        result = call()
    return result, sum(_changes(recorded))


def _changes(recorded: profile) -> Iterator[int]:
    """Bytes allocated (positive) and released (negative), in the order of time."""
    assert recorded.kineto_results is not None
    changes: list[tuple[int, int]] = [
        (event.start_ns(), event.nbytes())  # type: ignore[attr-defined]
        for event in recorded.kineto_results.events()
        if event.name() == "[memory]"
    ]
    return (nbytes for _, nbytes in sorted(changes, key=lambda change: change[0]))
