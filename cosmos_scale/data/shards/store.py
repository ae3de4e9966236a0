"""Shards that are not files of this machine: on web servers, where fsspec reaches, or the output of commands.

A store reads parts of a shard, or the whole shard piece by piece. An error that may pass is raised as `Transient`, and
`retried` waits and tries again; an error that no retry mends is a UserError. No message holds a secret: messages leave
out user names, passwords and queries of URLs, and everything of a command but the shard's name.
"""

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import urlsplit

import fsspec
import requests

from cosmos_scale.config import RemoteConfig
from cosmos_scale.config.section import redact_urls
from cosmos_scale.data.shards.pace import PIECE, PacedAdapter, TooSlow, paced_output, paced_part
from cosmos_scale.data.shards.web_answer import first_bytes, first_cause, says_its_end, through_proxy
from cosmos_scale.errors import UserError

PIPE = "pipe:"
LONGEST_WAIT = 30.0  # seconds between two tries

Result = TypeVar("Result")

_URL = re.compile(r"[A-Za-z][\w+.-]*(::[A-Za-z][\w+.-]*)*://")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_TOO_BUSY = (408, 425, 429)
_NO_ACCESS = (401, 403, 407)


class Transient(Exception):
    """A failure of a read that may pass; the text says how the read failed. final: another try would fail alike."""

    final = False


class Missing(Transient):
    """A shard is missing. Before a run the failure is final; during a run the shard's server may come back."""

    def __init__(self, how: str = "not found") -> None:
        super().__init__(how)


class WrongSize(Transient):
    """A shard has another size than its index says. found: the size, in words for messages."""

    def __init__(self, found: str, *, final: bool) -> None:
        super().__init__(f"{found} bytes came")
        self.found, self.final = found, final


class NoEnd(Transient):
    """An answer whose length is not known, and whose end does not come: another try would fail alike."""

    final = True


class NoParts(Exception):
    """This store hands out whole shards only."""


class Store(Protocol):
    """One kind of place for shards; an address is a URL, or pipe:COMMAND."""

    def read(self, address: str, offset: int, size: int, total: int) -> bytes:
        """Read `size` bytes from `offset` on; `total`: bytes that the shard must have. Raises NoParts."""

    def pieces(self, address: str, total: int | None) -> Generator[bytes, None, None]:
        """Yield a whole shard. Raises WrongSize where the store says another total; the caller counts the bytes."""

    def close(self) -> None:
        """Close connections; the next read opens new ones."""


def is_remote(address: str) -> bool:
    """Whether an address is a URL or a command rather than a path."""
    return address.startswith(PIPE) or _URL.match(address) is not None


def is_web(address: str) -> bool:
    """Whether an address is a web server's URL: such servers have ranges at best, and no list of their files."""
    return address.lower().startswith(("http://", "https://"))


def join_url(folder: str, name: str) -> str:
    """Return the URL of a file in a folder; the folder's query, such as a token, stays at the end."""
    base, mark, query = folder.partition("?") if is_web(folder) else (folder, "", "")
    return f"{base if base.endswith('://') else base.rstrip('/')}/{name}{mark}{query}"


def redact(text: str, address: str = "") -> str:
    """Leave the secrets of URLs out of a text. address: a URL whose secrets may stand in the text without the URL."""
    if is_web(address):
        parts = urlsplit(address)
        for secret in (parts.query, parts.netloc.rpartition("@")[0], parts.password):
            text = text.replace(secret, "***") if secret else text
    return redact_urls(text)


def retried(action: Callable[[], Result], remote: RemoteConfig, *, await_missing: bool = False) -> Result:
    """Return what `action` returns, trying again, after waits that double, where it raises Transient.

    await_missing: whether a missing shard may come back.
    Raises: the last Transient; any other exception of `action` at once.
    """
    wait = remote.backoff_s
    for _ in range(remote.retries):
        try:
            return action()
        except Transient as failure:
            if failure.final or (isinstance(failure, Missing) and not await_missing):
                raise
        time.sleep(min(wait, LONGEST_WAIT))
        wait *= 2
    return action()


class Stores:
    """The stores of one process, opened when first needed: a forked process opens its own."""

    def __init__(self, remote: RemoteConfig) -> None:
        self._remote = remote
        self._stores: dict[str, Store] = {}
        self._pid = os.getpid()

    def of(self, address: str) -> Store:
        """Return the store that an address belongs to; raises UserError where a web address is none."""
        if self._pid != os.getpid():  # two processes must not talk over one connection
            self._stores, self._pid = {}, os.getpid()
        kind = PIPE if address.startswith(PIPE) else "web" if is_web(address) else "fsspec"
        if kind == "web":
            try:
                urlsplit(address)
            except ValueError as error:  # of brackets that do not enclose a number
                raise UserError(f"{redact(address)}: not a valid URL: {error}") from error
        if kind not in self._stores:
            self._stores[kind] = self._open(kind)
        return self._stores[kind]

    def close(self) -> None:
        """Close every connection."""
        if self._pid == os.getpid():
            for store in self._stores.values():
                store.close()

    def _open(self, kind: str) -> Store:
        limits = self._remote.timeout_s, self._remote.lowest_speed
        if kind == PIPE:
            return CommandStore(*limits)
        return WebStore(*limits) if kind == "web" else FilesystemStore(*limits)


def fetch_into(file: BinaryIO, address: str, remote: RemoteConfig) -> None:
    """Write a shard or other file from its store into an open file; raises Transient where all tries fail."""
    stores = Stores(remote)

    def attempt() -> None:
        file.seek(0)
        file.truncate()
        for piece in stores.of(address).pieces(address, None):
            file.write(piece)

    try:
        retried(attempt, remote)
    finally:
        stores.close()
    file.flush()
    file.seek(0)


class WebStore:
    """Shards on web servers: byte ranges over connections that stay open."""

    def __init__(self, timeout_s: float, lowest_speed: float = 0.0) -> None:
        self._timeout_s = timeout_s
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, PacedAdapter(lowest_speed))

    def read(self, address: str, offset: int, size: int, total: int) -> bytes:
        """Read a range; raises NoParts where the server ignores ranges."""
        with self._errors(address), self._get(address, {"Range": f"bytes={offset}-{offset + size - 1}"}) as answer:
            if answer.status_code == 200:
                _check_total(answer.headers.get("Content-Length"), total, answer)
                raise NoParts
            found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if found is None or int(found[1]) != offset:
                raise Transient("the server sent another range than was asked for")
            _check_total(found[3], total, answer)
            data = answer.content if says_its_end(answer) else b"".join(first_bytes(answer, size, PIECE))
            if len(data) != size:
                raise Transient(f"the server sent {len(data)} of {size} bytes")
            return data

    def pieces(self, address: str, total: int | None) -> Generator[bytes, None, None]:
        """Yield a whole file."""
        with self._errors(address), self._get(address, {}) as answer:
            length = answer.headers.get("Content-Length")
            _check_total(length, total, answer)
            if total is not None and not says_its_end(answer):
                yield from first_bytes(answer, total, PIECE)
                return
            if length is not None and not says_its_end(answer):
                raise NoEnd(f"the server says Content-Length: {length[:80]!r}; rule: the number of its answer's bytes")
            try:
                yield from answer.iter_content(PIECE)
            except requests.RequestException as error:
                cause = first_cause(error)
                if says_its_end(answer) or isinstance(cause, TooSlow) or not isinstance(cause, TimeoutError):
                    raise
                how = f"no end of its answer for {self._timeout_s:g} s, and no Content-Length"
                raise NoEnd(f"the server sends {how}") from error

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def _get(self, address: str, headers: dict[str, str]) -> requests.Response:
        headers = {"Accept-Encoding": "identity", **headers}  # offsets count bytes as they are stored
        answer = self._session.get(address, headers=headers, timeout=self._timeout_s, stream=True)
        status = answer.status_code
        if status in (200, 206):
            return answer
        answer.close()
        if status in (404, 410):
            raise Missing(f"not found (HTTP {status})")
        if status in _TOO_BUSY or status >= 500:
            raise Transient(f"HTTP {status}")
        if status == 416:  # asked for bytes behind its end
            raise WrongSize(answer.headers.get("Content-Range", "").partition("/")[2] or "fewer", final=True)
        refused = "access is refused" if status in _NO_ACCESS else "the server refuses"
        raise UserError(f"{redact(address)}: {refused} (HTTP {status})")

    @contextmanager
    def _errors(self, address: str) -> Iterator[None]:
        try:
            yield
        except (
            requests.exceptions.InvalidURL,
            requests.exceptions.TooManyRedirects,
            requests.exceptions.InvalidHeader,
        ) as error:
            raise UserError(f"{redact(address)}: {redact(str(error), address)}") from error
        except requests.RequestException as error:
            raise Transient(redact(self._cause(error), address) + through_proxy(address)) from error

    def _cause(self, error: BaseException) -> str:
        """Word the error at the bottom of a chain; those above it repeat it in more words."""
        error = first_cause(error)
        if isinstance(error, TooSlow):
            return f"the server sends {error}"
        if isinstance(error, TimeoutError):
            return f"no answer for {self._timeout_s:g} s"
        return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _check_total(found: str | None, total: int | None, answer: requests.Response) -> None:
    if found is not None and total is not None and found.isdigit() and int(found) != total:
        if answer.headers.get("Content-Type", "").startswith("text/html"):
            raise Transient("the server sent a web page, as for a login, instead of the shard")
        raise WrongSize(found, final=True)


class FilesystemStore:
    """Shards where fsspec reaches: s3://, gs://, hdfs://, memory://, file://, ...

    Time-outs are those of each kind of file system, whose package must be installed; parts, see `paced_part`.
    """

    def __init__(self, timeout_s: float = 0.0, lowest_speed: float = 0.0) -> None:
        self._limits = timeout_s, lowest_speed
        self._sizes: dict[str, int | None] = {}

    def read(self, address: str, offset: int, size: int, total: int) -> bytes:
        """Read a part; raises NoParts where the file system cannot."""
        filesystem, path = open_filesystem(address)
        with _filesystem_errors(address):
            self._check_size(filesystem, path, address, total)
            try:
                limits = (0.0, 0.0) if "::" in address else self._limits  # the first read may fetch the whole shard
                data = paced_part(filesystem, path, offset, offset + size, *limits)
            except NotImplementedError as error:
                raise NoParts from error
        if len(data) != size:
            raise Transient(f"{len(data)} of {size} bytes came")
        return data

    def pieces(self, address: str, total: int | None) -> Generator[bytes, None, None]:
        """Yield a whole file."""
        filesystem, path = open_filesystem(address)
        with _filesystem_errors(address):
            if total is not None:
                self._check_size(filesystem, path, address, total)
            with filesystem.open(path, "rb") as file:
                while piece := file.read(PIECE):
                    yield piece

    def close(self) -> None:
        """Nothing to close: fsspec keeps the connections."""

    def _check_size(self, filesystem: Any, path: str, address: str, total: int) -> None:
        """Ask for a file's size once."""
        if address not in self._sizes:
            self._sizes[address] = filesystem.size(path)
        size = self._sizes[address]
        if size is not None and size != total:
            del self._sizes[address]
            raise WrongSize(str(size), final=True)


def open_filesystem(address: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the URL's path in it; raises UserError where there is none."""
    try:
        filesystem, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:  # a package is missing; nobody knows the scheme
        raise UserError(f"{redact(address)}: {redact(str(error), address)}") from error
    return filesystem, path


@contextmanager
def _filesystem_errors(address: str) -> Iterator[None]:
    try:
        yield
    except (UserError, Transient, NoParts):
        raise
    except FileNotFoundError as error:
        raise Missing from error
    except PermissionError as error:
        raise UserError(f"{redact(address)}: access is refused: {redact(str(error), address)}") from error
    except Exception as error:  # each file system raises errors of its own
        first_line = str(error).partition("\n")[0] or type(error).__name__
        raise Transient(redact(first_line, address)) from error


def list_filesystem(address: str, pattern: str) -> list[str]:
    """List the files below a folder's URL that a glob pattern means, relative to it.

    Raises: UserError where there is no such file system or it cannot be listed.
    """
    filesystem, root = open_filesystem(address)
    root = root.rstrip("/")
    try:
        with _filesystem_errors(address):
            paths = filesystem.glob(f"{root}/{pattern}")
    except Transient as failure:
        raise UserError(f"{redact(address)}: cannot be listed: {failure}") from failure
    return sorted(path[len(root) + 1 :] for path in paths)


class CommandStore:
    """Shards that a command writes to its standard output, as webdataset's pipe: has them."""

    def __init__(self, timeout_s: float, lowest_speed: float = 0.0) -> None:
        self._timeout_s, self._lowest_speed = timeout_s, lowest_speed

    def read(self, address: str, offset: int, size: int, total: int) -> bytes:
        """A command writes all or nothing."""
        raise NoParts

    def pieces(self, address: str, total: int | None) -> Generator[bytes, None, None]:
        """Run the command in a shell, and yield what it writes."""
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                address[len(PIPE) :],
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # so that the commands of a pipeline end together
            )
            assert process.stdout is not None
            try:
                yield from paced_output(process.stdout.fileno(), self._timeout_s, self._lowest_speed)
                status = process.wait(self._timeout_s)
            except TooSlow as error:
                raise Transient(f"the command wrote {error}") from error
            except subprocess.TimeoutExpired as error:
                raise Transient(f"the command does not end, {self._timeout_s:g} s after its last byte") from error
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                process.stdout.close()
            if status:
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise Transient(f"the command failed with status {status}: {redact(said)}".rstrip(": "))

    def close(self) -> None:
        """Nothing stays open."""
