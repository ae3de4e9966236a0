"""The end of a program: what Python does at its exit, and then the process ends at once."""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from cosmos_scale.run.stop_request import ignore_terminations


def leave_after(main: Callable[[], int]) -> NoReturn:
    """Run a program's main function and end the process with the status that it returns.

    After `main` Python waits for threads and calls what is registered with atexit (process groups, loader processes,
    wandb). Its last work is to take the interpreter apart, and that is left out here: threads of gloo and CUDA still
    run, and one that lets go of a tensor meanwhile aborts the process, so that a run that ended well has status 134.
    An exception has the status that Python gives it, and its traceback. Signals that ask a program to end change
    nothing any more: launchers repeat them while the program leaves, and its status says what it has done. Ctrl-C ends
    what Python waits for at that moment, without a traceback.
    """
    _open_missing_streams()
    status = 1
    try:
        status = main()
    except SystemExit as end:  # of argparse
        status = _status(end)
    except KeyboardInterrupt:  # before `main` handles it, or after
        status = 130  # as shells number it
        with suppress(OSError):
            print("cosmos-scale: interrupted", file=sys.stderr)
    except BaseException:
        _show_error()
    ignore_terminations()
    sys.unraisablehook = _show_unraisable
    for step in (threading._shutdown, atexit._run_exitfuncs, _flush):  # type: ignore[attr-defined]
        try:
            step()
        except KeyboardInterrupt:
            continue  # do not wait for this any longer
        except BaseException:
            _show_error()
            status = status or 1
    os._exit(status)


def _open_missing_streams() -> None:
    """Put /dev/null in the place of streams that are closed at the start (`>&-`): Python has None for them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open to the end)


def _status(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _show_error() -> None:
    with suppress(OSError):  # of a standard error that nobody reads
        sys.excepthook(*sys.exc_info())


def _show_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Show an exception that Python cannot pass on, as of a function of atexit, unless it is an interrupt."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # what nobody can read any more; a stream that is closed
            stream.flush()
