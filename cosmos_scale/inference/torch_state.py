"""What a caller has told torch for all of a process: none of it may change or break what a loaded model computes."""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

# OpenMP's threads of the process are not there in one that is forked off it: a computation on several would wait for
# them for ever. torch's own loaders start their workers so too.
os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


class _Float32:
    """torch's default dtype is float32 while any thread of the process computes; then it is what it was before.

    It is one of the whole process: each thread for itself would set it back while another one still computes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = torch.float32

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.get_default_dtype()
                if self._before != torch.float32:
                    torch.set_default_dtype(torch.float32)
            self._inside += 1

    def __exit__(self, *failure: object) -> None:
        with self._lock:
            self._inside = max(0, self._inside - 1)  # a forked process may leave a block that it was born in
            if not self._inside and self._before != torch.float32:
                torch.set_default_dtype(self._before)

    def forked(self) -> None:
        """In a new process: the threads that computed are not there, and neither is the one that may hold the lock."""
        self._lock = threading.Lock()
        if self._inside:
            self._inside = 0
            torch.set_default_dtype(self._before)


_FLOAT32 = _Float32()
os.register_at_fork(after_in_child=_FLOAT32.forked)


@contextmanager
def usual_torch() -> Iterator[None]:
    """Compute in this block, or in a function, in float32 and on the CPU unless told, whatever the caller has set.

    Such as torch.set_default_dtype, torch.set_default_device and torch.autocast; all hold again afterwards.
    """
    with ExitStack() as stack:
        stack.enter_context(_FLOAT32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
