"""What ends a program while it still imports its parts, which takes seconds: one line, and no traceback.

It is Ctrl-C, a current folder that has been deleted, or a limit on memory that leaves no room for torch.
"""

import os
import resource
import signal
import sys
from functools import partial
from types import FrameType, TracebackType

from cosmos_scale.exit_status import INTERRUPTED, REFUSED

DELETED_FOLDER = "the current folder is deleted; rule: change to one that is there"
# Bytes that the libraries map, torch first: 3.5 GiB on a CPU. With less some of them abort the process.
LEAST_ADDRESS_SPACE = 4 << 30
_HOOK = sys.excepthook
_IMPORTING = "<frozen importlib"  # how the file names of Python's own import code begin


def tell_interrupts(program: str) -> None:
    """From here on print one line where an interrupt ends this process; any other exception as before.

    An interrupt during an import ends the process at once: extension modules (torch, numpy, pydantic) lose the
    exception, turn it into another one, or abort.
    """
    sys.excepthook = partial(_tell, program)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where interrupts are ignored
        signal.signal(signal.SIGINT, partial(_interrupt, program))


def refuse_to_import(program: str) -> None:
    """End this process, with one line, where its current folder is deleted, or the limit on memory is too small.

    MKL or torch, which it loads, would end it without a word on the cause.
    """
    refusal = little_address_space()
    try:
        os.getcwd()
    except OSError:
        refusal = DELETED_FOLDER
    if refusal:
        os.write(2, f"{program}: {refusal}\n".encode())
        os._exit(REFUSED)


def little_address_space() -> str:
    """Return a line on the limit of `ulimit -v` where the libraries alone do not fit; empty where they do."""
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    if allowed == resource.RLIM_INFINITY or allowed >= LEAST_ADDRESS_SPACE:
        return ""
    return f"memory: {allowed:,} bytes are allowed; rule: at least {LEAST_ADDRESS_SPACE:,} (ulimit -v)"


def _interrupt(program: str, number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORTING):
            # Not print: the interrupt may come in the middle of another one.
            os.write(2, f"{program}: interrupted\n".encode())
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _tell(program: str, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(f"{program}: interrupted", file=sys.stderr)
    else:
        _HOOK(kind, error, trace)
