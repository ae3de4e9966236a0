"""Who comes to rank 0's port before the ranks have met. Nothing slow is imported here."""

import select
import socket
import time


class Visitors:
    """Accepts who connects to a listener, and hands out who has said something; who is silent keeps nobody waiting."""

    def __init__(self, listener: socket.socket) -> None:
        """listener: is duplicated, so that the caller may close it, or hand it on, before."""
        self._listener = listener.dup()
        self._silent: dict[int, socket.socket] = {}
        self._spoke: list[int] = []
        self._poll = select.poll()
        self._poll.register(self._listener, select.POLLIN)

    def next(self, until: float) -> socket.socket | None:
        """Return the next one to speak, to be closed by the caller; None where nobody has until then (monotonic)."""
        while not self._spoke:
            left = until - time.monotonic()
            if left <= 0:
                return None
            for number, _ in self._poll.poll(1000 * left):
                if number != self._listener.fileno():
                    self._poll.unregister(number)
                    self._spoke.append(number)
                    continue
                visitor, _ = self._listener.accept()
                self._silent[visitor.fileno()] = visitor
                self._poll.register(visitor, select.POLLIN)
        return self._silent.pop(self._spoke.pop(0))

    def close(self) -> None:
        """Accept nobody any more, and close the connections of all that have not been handed out."""
        self._listener.close()
        for visitor in self._silent.values():
            visitor.close()
        self._silent.clear()
        self._spoke.clear()
