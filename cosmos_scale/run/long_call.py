"""A call of a library that may never return, such as one that waits for another process."""

import threading
from collections.abc import Callable


class LongCall:
    """A call on a thread of its own, which holds up neither the caller nor the end of the program."""

    def __init__(self, call: Callable[[], object]) -> None:
        """Start the call."""
        self._call = call
        self._failure: BaseException | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def ends_within(self, seconds: float) -> bool:
        """Wait for the end of the call, and return whether it has come."""
        return self._ended.wait(seconds)

    def result(self) -> None:
        """Raise what the call has raised, once it has ended."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as failure:  # of any type: libraries end with SystemExit too
            self._failure = failure
        finally:
            self._ended.set()
