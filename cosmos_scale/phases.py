"""The phases of a step, and the parts of a sample's making: named where they run, timed only while somebody listens."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

STEP_PHASES = ("data", "copy", "ranks", "student", "teacher", "loss", "backward", "update", "refresh", "figures")
"""In the order of a step. data: waits for the batch. copy: brings it to the device. ranks: agrees with other ranks that
the step begins. refresh: what the teacher's new weights cost, wherever in the step. figures: reads the step before.
"""
SAMPLE_PARTS = ("read", "decode", "plan", "crops", "colour", "blur", "tokens")
"""What the loader does for a sample. Crops: cut out, resized, and written into the batch."""


class PhaseListener(Protocol):
    """Is told of phases; they may lie in each other."""

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Return a context that lasts as long as the phase."""


_NOBODY = nullcontext()
_listeners: list[PhaseListener] = []


def phase(name: str) -> AbstractContextManager[object]:
    """Return the context in which a phase runs: one of STEP_PHASES, of SAMPLE_PARTS, or a part of a step's phase."""
    return _listeners[-1].phase(name) if _listeners else _NOBODY


@contextmanager
def listening(listener: PhaseListener) -> Iterator[None]:
    """Let a listener, and no other, be told of the phases inside."""
    before = list(_listeners)
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners[:] = before


def stop_listening() -> None:
    """Let nobody be told of phases any more: in a process forked off one that listens."""
    _listeners.clear()
