"""Garbage collection where processes are forked: a child must not clear away what belongs to its parent.

Garbage from before the fork may have finalisers: they end an older loader's processes, or wait for threads of a library
that the child does not have. In a child they hang or crash.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Fork processes in this block: no collection begins in them before they call `leave_parents_garbage`."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def leave_parents_garbage() -> None:
    """In a forked process: collect garbage from here on, but none of the parent's; its memory stays shared too."""
    gc.freeze()
    gc.enable()
