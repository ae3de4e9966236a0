"""Ctrl-C while a program still imports its parts, which takes seconds: one line, and no traceback."""

import sys
from functools import partial
from types import TracebackType

_HOOK = sys.excepthook


def tell_interrupts(program: str) -> None:
    """From here on print one line where an interrupt ends this process; any other exception as before."""
    sys.excepthook = partial(_tell, program)


def _tell(program: str, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(f"{program}: interrupted", file=sys.stderr)
    else:
        _HOOK(kind, error, trace)
