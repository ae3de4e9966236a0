"""What ends a program while it still imports its parts, which takes seconds: one line, and no traceback.

It is Ctrl-C, a current folder that has been deleted, a library that cannot be imported, or a limit on memory
or threads that leaves no room for torch. Programs import this module before all others, so it imports little itself.
"""

import os
import resource
import signal
import sys
from functools import partial
from types import FrameType, TracebackType

from cosmos_scale.exit_status import INTERRUPTED, REFUSED
from cosmos_scale.threads import too_few_threads

DELETED_FOLDER = "the current folder is deleted; rule: change to one that is there"
# Bytes that the libraries map, torch first: 3.5 GiB on a CPU. With less some of them abort the process.
LEAST_ADDRESS_SPACE = 4 << 30
_HOOK = sys.excepthook
_OUR_OWN = ("TORCH_CPP_LOG_LEVEL", "TORCH_EXTENSIONS_DIR")  # variables that the programs set themselves
_IMPORTING = "<frozen importlib"  # how the file names of Python's own import code begin


def tell_interrupts(program: str) -> None:
    """From here on print one line where an interrupt or a refused import ends this process; other exceptions as before.

    An interrupt during an import ends the process at once: extension modules (torch, numpy, pydantic) lose the
    exception, turn it into another one, or abort.
    """
    sys.excepthook = partial(_tell, program)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where interrupts are ignored
        signal.signal(signal.SIGINT, partial(_interrupt, program))


def refuse_to_import(program: str) -> None:
    """End this process, with one line, where its current folder is deleted, or memory or threads are limited too much.

    MKL, OpenBLAS or torch, which it loads, would end it without a word on the cause.
    """
    refusal = little_address_space() or too_few_threads()
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
    elif refused := refused_import(error):
        print(f"{program}: {refused}", file=sys.stderr, flush=True)
        os._exit(REFUSED)  # Python would end with status 1, which asks launchers for a restart
    else:
        _HOOK(kind, error, trace)


def refused_import(error: BaseException) -> str | None:
    """Return what to tell where a library cannot be imported, often for a variable of its own; None: another error."""
    import traceback  # here: its import takes longer than that of this module

    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    modules = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    library = next((module for module in modules if module not in ("cosmos_scale", "__main__")), None)
    if library is None:
        return None
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason is given")
    names = sorted(name for name in os.environ if name.startswith(f"{library.upper()}_") and name not in _OUR_OWN)
    where = f"look at its variables, of which are set: {', '.join(names)}" if names else "look at its installation"
    return f"{library}: cannot be imported: {type(error).__name__}: {said}; rule: {where}"
