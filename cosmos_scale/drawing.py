"""Figures look the same whatever a matplotlibrc, or the caller in Python, has set for figures of their own."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _OneAtATime:
    """matplotlib's settings are of the whole process: each of two threads would set back what the other one found."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """In a new process: the thread that may hold the lock is not there."""
        self.lock = threading.RLock()


_DRAWING = _OneAtATime()
os.register_at_fork(after_in_child=_DRAWING.renew)


@contextmanager
def usual_figures() -> Iterator[None]:
    """Draw in this block, or in a function, with matplotlib's defaults; what was set holds again afterwards.

    Such as text.usetex, which is set for a paper: it needs LaTeX, and takes names and captions for its code.
    """
    from matplotlib import style  # here: it takes half a second

    with _DRAWING.lock, style.context("default"):
        yield
