"""How much memory a call needs at its worst moment, counted by torch's own allocator."""

from collections.abc import Callable

from torch.autograd.profiler import profile


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes of CPU tensors that `call` holds at one time beside what it was given.

    What it returns counts. Every allocation and release is recorded, those inside operations and in autograd's backward
    too, so the number is the same on every run and every machine; a process's resident memory depends on both.
    """
    with profile(profile_memory=True) as recorded:
        result = call()
    del result  # held until here
    assert recorded.kineto_results is not None
    changes = [
        (event.start_ns(), event.nbytes()) for event in recorded.kineto_results.events() if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        held += nbytes
        peak = max(peak, held)
    return peak
