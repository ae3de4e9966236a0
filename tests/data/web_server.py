"""A small web server of files in its own process, with the faults that tests ask for; it writes down each request."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from mimetypes import guess_type
from pathlib import Path
from typing import Any, Literal, NamedTuple

PIECE = 1 << 20

Fault = Literal["500", "drop", "cut", "hang", "wrong", "drip", "drip head"]
DRIP = 0.05  # seconds between two bytes


class Request(NamedTuple):
    """One request: its path, its Range header, the status and bytes of the answer, the client's port."""

    path: str
    range: str | None
    status: int
    sent: int
    client: int


class WebServer(NamedTuple):
    url: str
    log: Path
    process: "subprocess.Popen[bytes]"

    def requests(self) -> list[Request]:
        return [Request(*json.loads(line)) for line in self.log.read_text().splitlines()]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def web_server(
    folder: Path,
    log: Path,
    *,
    ranges: bool = True,
    fail_every: int = 0,
    fault: Fault = "500",
    length: str | None = "right",
) -> Iterator[WebServer]:
    """Serve a folder; every `fail_every`-th request fails, in the way of `fault`. length: Content-Length, if any."""
    options = json.dumps(
        {"folder": str(folder), "ranges": ranges, "fail_every": fail_every, "fault": fault, "length": length}
    )
    log.write_text("")
    process = subprocess.Popen([sys.executable, __file__, str(log), options], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield WebServer(f"http://127.0.0.1:{port}", log, process)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open
    disable_nagle_algorithm = True  # head and body are two writes
    options: dict[str, Any] = {}  # noqa: RUF012 - set once, before serving
    log_path: Path
    number = 0

    def do_GET(self) -> None:
        _Handler.number += 1
        options = self.options
        fails = bool(options["fail_every"]) and self.number % options["fail_every"] == 0
        path = Path(options["folder"]) / self.path.lstrip("/").partition("?")[0]
        if "/refused/" in self.path:
            self._answer(403, b"")
        elif not path.is_file():
            self._answer(404, b"nothing here")
        elif fails and options["fault"] == "500":
            self._answer(500, b"try again")
        elif fails and options["fault"] == "drop":
            self._note(0, 0)
            self.close_connection = True
        elif fails and options["fault"] == "hang":
            self._note(0, 0)
            time.sleep(60)
        elif fails and options["fault"] == "drip head":
            self._note(0, 0)
            self._drip(b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 60_000)
        else:
            self._send(path.read_bytes(), options["fault"] if fails else None)

    def _send(self, data: bytes, fault: str | None) -> None:
        wanted = self.headers.get("Range")
        if wanted is None or not self.options["ranges"]:
            self._answer(200, data, fault=fault)
            return
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        if first >= len(data):
            self._answer(416, b"", f"bytes */{len(data)}")
            return
        if fault == "wrong":
            first += 1
        part = data[first : last + 1]
        self._answer(206, part, f"bytes {first}-{first + len(part) - 1}/{len(data)}", fault=fault)

    def _answer(self, status: int, data: bytes, content_range: str | None = None, fault: str | None = None) -> None:
        cut, drips = fault == "cut", fault == "drip"
        sent = data[: len(data) // 2] if cut else data
        if len(sent) <= PIECE:
            self._note(status, len(sent))  # before the client has the whole answer and the test looks
        self.send_response(status)
        length = self.options["length"]
        if length is not None:
            self.send_header("Content-Length", str(len(data)) if length == "right" else length)
        if kind := guess_type(self.path)[0]:
            self.send_header("Content-Type", kind)
        if content_range is not None:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if drips:
            self._drip(sent)
            return
        taken = 0
        try:
            for start in range(0, len(sent), PIECE):
                taken += self.wfile.write(sent[start : start + PIECE])
        except (BrokenPipeError, ConnectionResetError):
            cut = True  # the client wanted only a part, and hung up
        if len(sent) > PIECE:
            self._note(status, taken)
        self.close_connection = self.close_connection or cut

    def _drip(self, data: bytes) -> None:
        """Send byte after byte, which keeps every limit between two bytes."""
        self.close_connection = True
        with suppress(BrokenPipeError, ConnectionResetError):
            for byte in data:
                self.wfile.write(bytes([byte]))
                time.sleep(DRIP)

    def _note(self, status: int, sent: int) -> None:
        request = Request(self.path, self.headers.get("Range"), status, sent, self.client_address[1])
        with self.log_path.open("a") as log:
            log.write(json.dumps(request) + "\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients may hang up


if __name__ == "__main__":
    _Handler.log_path = Path(sys.argv[1])
    _Handler.options = json.loads(sys.argv[2])
    with _Server(("127.0.0.1", 0), _Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
