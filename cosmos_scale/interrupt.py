"""What ends a program while it still imports its parts, which takes seconds: one line, and no traceback.

It is Ctrl-C, or a current folder that has been deleted.
"""

import os
import signal
import sys
from functools import partial
from types import FrameType, TracebackType

from cosmos_scale.exit_status import INTERRUPTED, REFUSED

DELETED_FOLDER = "the current folder is deleted; rule: change to one that is there"
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


def refuse_deleted_folder(program: str) -> None:
    """End this process, with one line, where its current folder is deleted.

    MKL, which torch loads, would end it without a word on the cause.
    """
    try:
        os.getcwd()
    except OSError:
        os.write(2, f"{program}: {DELETED_FOLDER}\n".encode())
        os._exit(REFUSED)


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
