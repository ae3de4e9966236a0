"""Contact between the ranks: each process learns within a second that another one has ended, whatever it waits for.

Rank 0 keeps its connection to every other rank from their meeting on. A connection is closed by the kernel where a
process ends in whatever way, unless the process has said goodbye before. Rank 0 tells the others of it. A collective of
gloo fails by itself then; NCCL's would wait for ten minutes, and so would whoever waits for the device.
"""

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple

from cosmos_scale.errors import JointError, UserError
from cosmos_scale.exit_status import FAILED

SECONDS_TO_END = 15.0  # from the loss of a rank until this process ends, if it has not ended by itself
SECONDS_A_LINE = 5.0  # in which the rest of a line comes
LONGEST_LINE = 4000  # bytes
LONGEST_TEXT = 800  # characters of an error, of up to four bytes each
LOOK = 0.5  # seconds between looks whether the contact has ended
PAUSE = 0.0005  # seconds between questions whether the device is ready
GOODBYE, LOST, WATCH = "goodbye", "lost", "watch"
# What ranks say as they meet, each on a line of its own; a refusal is of a rank that does not come.
GREETING, WELCOME, GO, REFUSED = "cosmos-scale rank ", "cosmos-scale welcome to ", "go", "refused: "
REFUSAL = "cosmos-scale refusal: "


class LostRank(Exception):
    """Another rank has ended while this one waited for it; the text names it."""


class Peer(NamedTuple):
    """The other end of a connection: a rank and its host."""

    rank: int
    host: str
    connection: socket.socket


class Contact:
    """Watches the processes of other ranks: of all of them on rank 0, of rank 0 on the others.

    `lost` names the first rank that ended without a goodbye, None as long as there is none. Where this process has not
    ended SECONDS_TO_END after that, since its main thread waits for what does not come, the contact ends the process
    with status 1 by os._exit: destroying process groups could wait for ever.

    A context for what all ranks do to its end: who leaves it by an error of its own is lost to the others.
    """

    def __init__(self, rank: int, peers: Mapping[int, Peer]) -> None:
        """peers: by rank; none where this process trains alone or has not met the others."""
        self.rank = rank
        self._peers = dict(peers)
        self._known = threading.Event()
        self._telling = threading.Lock()  # taken for good by the first that tells
        self._parted = False
        self._ending = False
        self._told_by_first = False  # rank 0 has told of the loss, and prints it
        self._listener: Callable[[int, str], None] | None = None
        self.lost: str | None = None

    def __enter__(self) -> "Contact":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say goodbye where all ranks leave the block alike: from here on each may end.

        Of an error that a user can mend, and that this rank alone has, the others hear the text.
        """
        if kind is None or issubclass(kind, JointError):
            self._parted = True
            word = GOODBYE
        elif issubclass(kind, UserError):
            word = f"{LOST} {_ended(self.rank, socket.gethostname())}: {' '.join(str(error).split())[:LONGEST_TEXT]}"
        else:
            return
        for peer in list(self._peers.values()):
            _send(peer, word)

    def watch(self) -> None:
        """Start to watch, in a thread."""
        if self._peers:
            # Loader processes are forked: with a copy of a connection they would keep it open.
            os.register_at_fork(after_in_child=self._close)
            threading.Thread(target=self._watch, name="contact", daemon=True).start()

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready`, as the query of a CUDA event; raises LostRank where a rank is lost before."""
        while not ready():
            if self.lost is not None:
                raise LostRank(self.lost)
            time.sleep(PAUSE)

    def lost_within(self, seconds: float) -> str | None:
        """Return the name of the lost rank, if a rank is lost now or within some seconds."""
        if self._peers:
            self._known.wait(seconds)
        return self.lost

    def tell(self, line: str) -> None:
        """Print a line on the loss to standard error, once; only rank 0 does so of a loss that it has told of."""
        if self._telling.acquire(blocking=False) and not self._told_by_first:
            with suppress(OSError):  # of a standard error that nobody reads
                print(line, file=sys.stderr, flush=True)

    @property
    def hosts(self) -> dict[int, str]:
        """The hosts of the ranks that this process is connected to, by rank."""
        return {peer.rank: peer.host for peer in list(self._peers.values())}

    def listen(self, listener: Callable[[int, str], None]) -> None:
        """Hand each line that another rank sends by `send_all` to a function (rank, line), in the contact's thread."""
        self._listener = listener

    def send_all(self, line: str, *, to: int | None = None) -> None:
        """Send a line to the other ranks that this process is connected to, or to one of them alone."""
        for peer in list(self._peers.values()):
            if to in (None, peer.rank):
                _send(peer, f"{WATCH} {line}")

    def end(self) -> bool:
        """Let no loss be told any more, since this process ends itself; returns whether none has been told before."""
        self._ending = True
        return self._telling.acquire(blocking=False) and not self._told_by_first

    @property
    def broken(self) -> bool:
        """Whether a rank is lost, or this process has told so: then no group is to be destroyed."""
        return self.lost is not None or (bool(self._peers) and self._telling.locked())

    def _watch(self) -> None:
        while not self._parted and self._peers and self.lost is None:
            self._hear_all()
        if self.lost is None:
            return
        try:
            end = time.monotonic() + SECONDS_TO_END
            while time.monotonic() < end or self._ending:
                if self._parted or not self._peers:
                    time.sleep(LOOK)
                else:  # the watchdogs of those that are left may ask each other
                    self._hear_all()
            line = f"cosmos-scale: rank {self.rank} lost contact with another rank: {self.lost}"
            teller = threading.Thread(target=self.tell, args=(line,), daemon=True)  # the output may be stuck too
            teller.start()
            teller.join(1.0)
        finally:  # also where no thread can be started
            os._exit(FAILED)

    def _hear_all(self) -> None:
        for peer in self._speaking():
            line = ""  # of a closed connection
            with suppress(OSError):
                line = read_line(peer.connection, SECONDS_A_LINE)
            self._hear(peer, line)

    def _speaking(self) -> list[Peer]:
        """Wait a while, and return the peers that have said something or whose connection is closed."""
        poll = select.poll()
        peers = {peer.connection.fileno(): peer for peer in self._peers.values()}
        for number in peers:
            poll.register(number, select.POLLIN)
        return [peers[number] for number, _ in poll.poll(1000 * LOOK)]

    def _hear(self, peer: Peer, line: str) -> None:
        word, _, name = line.partition(" ")
        if self._parted:
            return
        if word == WATCH:
            if self._listener is not None:
                self._listener(peer.rank, name)
            return
        if self.lost is None and word != GOODBYE and not self._ending:
            self._lose(peer, word, name)
        if word != LOST or self._ending:
            del self._peers[peer.rank]

    def _lose(self, peer: Peer, word: str, name: str) -> None:
        lost = name if word == LOST else _ended(peer.rank, peer.host)
        for other in self._peers.values():
            if self.rank == 0 and other is not peer:
                _send(other, f"{LOST} {lost}")
        self._told_by_first = word == LOST and peer.rank == 0
        self.lost = lost
        self._known.set()

    def _close(self) -> None:
        for peer in self._peers.values():
            peer.connection.close()


def _ended(rank: int, host: str) -> str:
    return f"rank {rank} on host {host} has ended"


def _send(peer: Peer, line: str) -> None:
    with suppress(OSError):  # of a rank that has ended
        peer.connection.sendall(f"{line}\n".encode())


def read_line(connection: socket.socket, seconds: float) -> str:
    """Return the next line without its end, or what comes of it; no byte behind it is read. Raises OSError."""
    deadline = time.monotonic() + seconds
    data = b""
    while len(data) < LONGEST_LINE:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        byte = connection.recv(1)
        if byte in (b"", b"\n"):
            break
        data += byte
    return data.decode(errors="replace")
