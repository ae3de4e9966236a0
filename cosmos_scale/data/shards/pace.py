"""How fast the bytes of an answer must come: a server that drips keeps every time limit between two bytes."""

import asyncio
import io
import os
import select
import socket
import time
from collections.abc import Iterator
from functools import partial
from http.client import HTTPResponse
from typing import Any

from fsspec.asyn import AsyncFileSystem, sync
from requests.adapters import HTTPAdapter

TIMEOUTS = (TimeoutError, asyncio.TimeoutError)  # two types before Python 3.11
PIECE = 1 << 20  # bytes at a time of a whole shard


class TooSlow(TimeoutError):
    """The bytes of an answer come more slowly than they must; the text says how fast they came, and the rule."""


class Pace:
    """Counts the bytes of one answer and the time spent waiting for them.

    The first wait does not count: a server may take its time before it answers, and timeout_s limits that wait.
    """

    def __init__(self, timeout_s: float, lowest_speed: float) -> None:
        """timeout_s: seconds of waiting after which the speed is looked at, again and again.

        lowest_speed: bytes per second.
        """
        self._timeout_s, self._lowest_speed = timeout_s, lowest_speed
        self._waited, self._came = 0.0, 0
        self._has_begun = False

    def check(self) -> None:
        """Raise TooSlow before a further wait where the bytes so far came too slowly."""
        if self._waited < self._timeout_s:
            return
        if self._came < self._lowest_speed * self._waited:
            speed = f"{self._came / self._waited:.3g} bytes/s for {self._waited:.3g} s"
            rule = f"at least {self._lowest_speed:g} over data.remote.timeout_s, {self._timeout_s:g} s"
            raise TooSlow(f"{speed}; rule: data.remote.lowest_speed: {rule}")
        self._waited, self._came = 0.0, 0

    def add(self, seconds: float, count: int) -> None:
        """Count one wait and the bytes that came."""
        if self._has_begun:
            self._waited += seconds
            self._came += count
        self._has_begun = True


def paced_output(descriptor: int, timeout_s: float, lowest_speed: float) -> Iterator[bytes]:
    """Yield what a command writes to a pipe; raises TooSlow where it does not write for timeout_s, or too slowly."""
    pace = Pace(timeout_s, lowest_speed)
    poll = select.poll()  # select would refuse descriptors past 1023
    poll.register(descriptor, select.POLLIN | select.POLLHUP)
    while True:
        pace.check()
        started = time.monotonic()
        if not poll.poll(timeout_s * 1000):
            raise TooSlow(f"nothing for {timeout_s:g} s")
        piece = os.read(descriptor, PIECE)
        pace.add(time.monotonic() - started, len(piece))
        if not piece:
            return
        yield piece


def paced_part(filesystem: Any, path: str, start: int, end: int, timeout_s: float, lowest_speed: float) -> bytes:
    """Return a part of a file of one of fsspec's file systems; raises what the file system raises.

    Where its reads can be ended (s3, gs, abfs) and lowest_speed is not 0, raises TooSlow where the part takes longer
    than timeout_s and its bytes at lowest_speed. Of other file systems the time is not limited here.
    """
    # By the type: fsspec's caches answer with the attributes of the file system behind them.
    if lowest_speed == 0 or not issubclass(type(filesystem), AsyncFileSystem):
        data: bytes = filesystem.cat_file(path, start=start, end=end)
        return data
    limit, begun = timeout_s + (end - start) / lowest_speed, time.monotonic()
    try:
        # As cat_file does it, which takes no limit; the read is cancelled at the limit.
        data = sync(filesystem.loop, filesystem._cat_file, path, start=start, end=end, timeout=limit)
    except TIMEOUTS as error:
        if time.monotonic() - begun < limit:  # of the file system's own connection
            raise
        rule = f"data.remote.timeout_s, {timeout_s:g} s, and the bytes at data.remote.lowest_speed, {lowest_speed:g}"
        raise TooSlow(f"{end - start} bytes did not come within {limit:.3g} s; rule: {rule} bytes/s") from error
    return data


class PacedAdapter(HTTPAdapter):
    """Connections whose answers, heads included, raise TooSlow: requests' own time limit is one between two bytes."""

    def __init__(self, lowest_speed: float) -> None:
        """lowest_speed: bytes per second."""
        self._lowest_speed = lowest_speed
        super().__init__(pool_maxsize=1, max_retries=0)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """Make the connections of this adapter."""
        super().init_poolmanager(*args, **options)
        self._pace(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **options: Any) -> Any:
        """Return the connections to a proxy."""
        manager = super().proxy_manager_for(*args, **options)
        self._pace(manager)
        return manager

    def _pace(self, manager: Any) -> None:
        answer = staticmethod(partial(_PacedAnswer, self._lowest_speed))
        for scheme, pool in (pools := dict(manager.pool_classes_by_scheme)).items():
            connection = type("PacedConnection", (pool.ConnectionCls,), {"response_class": answer})
            pools[scheme] = type("PacedConnections", (pool,), {"ConnectionCls": connection})
        manager.pool_classes_by_scheme = pools


class _PacedAnswer(HTTPResponse):
    """An answer that is read through _PacedBytes from its first line on."""

    def __init__(self, lowest_speed: float, connection: socket.socket, **options: Any) -> None:
        super().__init__(connection, **options)
        timeout_s = connection.gettimeout()
        if timeout_s is not None:
            self.fp: io.BufferedReader = io.BufferedReader(_PacedBytes(self.fp.detach(), Pace(timeout_s, lowest_speed)))


class _PacedBytes(io.RawIOBase):
    """The bytes of a socket, with a look at their speed before each read."""

    def __init__(self, bytes_of_socket: io.RawIOBase, pace: Pace) -> None:
        self._bytes, self._pace = bytes_of_socket, pace

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._pace.check()
        started = time.monotonic()
        count: int | None = self._bytes.readinto(buffer)
        self._pace.add(time.monotonic() - started, count or 0)
        return count

    def close(self) -> None:
        self._bytes.close()
        super().close()
