"""Standard output and standard error where they cannot be written: a closed pipe or terminal, a full disk."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from cosmos_scale.errors import UserError
from cosmos_scale.files import reason_of


@contextmanager
def told_output() -> Iterator[None]:
    """Raise UserError where the block cannot write standard output; BrokenPipeError where its reader has left."""

    def tell(error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            raise error
        raise UserError(f"standard output: cannot be written: {reason_of(error)}") from error

    before = sys.stdout
    sys.stdout = cast(TextIO, _WatchedStream(before, tell))
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout = before


@contextmanager
def lasting_output() -> Iterator[None]:
    """Drop what the block writes where nobody can take it, and say so once on the other of the two streams.

    Characters that the output's encoding lacks are written as \\x.. or \\u....
    """
    before = sys.stdout, sys.stderr
    streams = [stream.stream if isinstance(stream, _WatchedStream) else stream for stream in before]
    failed: set[str] = set()

    def tell(name: str, error: OSError) -> None:
        if name in failed:
            return
        failed.add(name)
        other = sys.stderr if name == "standard output" else sys.stdout
        print(f"warning: {name}: {error.strerror or error}; the run goes on without it", file=other, flush=True)

    out = _WatchedStream(streams[0], lambda error: tell("standard output", error))
    errors = _WatchedStream(streams[1], lambda error: tell("standard error", error))
    for stream in streams:
        reconfigure = getattr(stream, "reconfigure", None)  # only real files have it
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, errors)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        if failed:
            for stream in streams:
                _empty(stream)


class _WatchedStream:
    """A stream that hands the errors of its writes to a function."""

    def __init__(self, stream: TextIO, failed: Callable[[OSError], None]) -> None:
        self.stream, self._failed = stream, failed

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._failed(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _empty(stream: TextIO) -> None:
    """Let what still waits in a stream go nowhere where it cannot be written, or the last flush would fail too."""
    with suppress(OSError):
        stream.flush()
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
