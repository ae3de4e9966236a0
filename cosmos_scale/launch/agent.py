"""The agent: starts the ranks of one host, watches them, and ends them when the launcher is gone.

The launcher starts an agent on each host, over ssh or as its own child, and writes one job to its standard input. The
connection is the supervision: at its end, or after a long silence on it, the agent asks its ranks to stop with a
checkpoint. A rank whose agent dies gets the same signal from the kernel.

Why an agent of our own: DeepSpeed's launcher ends processes by a pattern of their names and 30 s after a signal at the
latest, and torch's elastic agent starts all ranks anew at a rendezvous of its own, without a word to the ranks' output,
their signals or the folder that two launches share. Nothing slow is imported here.
"""

import ctypes
import os
import queue
import selectors
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cosmos_scale.exit_status import REFUSED
from cosmos_scale.launch.signals import ASK
from cosmos_scale.launch.wire import Inbox, Message, Outbox
from cosmos_scale.line_file import LineFile

BEAT = 5.0  # seconds between two signs of life, of both sides
LONGEST_LINE = 1 << 16  # bytes of a rank's output, after which a line is cut
LAST_LINES_WITHIN = 5.0  # seconds for what still waits for the ranks' files
MOST_PIECES = 10_000  # of output that wait for the ranks' files
ENDS_WITHIN = 20.0  # seconds in which the ranks of a host without a launcher end after the first one that failed

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h


class Logs:
    """The files that keep what ranks print, written by a thread: a hanging file server does not silence the agent."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[LineFile, list[str]] | None] = queue.Queue(MOST_PIECES)
        self._thread = threading.Thread(target=self._write, daemon=True)

    def start(self) -> None:
        """Begin to write; once all ranks are started, since a process with threads does not fork well."""
        self._thread.start()

    def put(self, log: LineFile, lines: list[str]) -> None:
        """Give lines to be written to a file; they are dropped where too many wait."""
        with suppress(queue.Full):
            self._waiting.put_nowait((log, lines))

    def close(self, seconds: float) -> None:
        """Write what waits, but for no longer than some seconds."""
        with suppress(queue.Full):
            self._waiting.put(None, timeout=seconds)
        self._thread.join(seconds)

    def _write(self) -> None:
        while (piece := self._waiting.get()) is not None:
            log, lines = piece
            log.append(lines)


class RankProcess:
    """A rank's process, which leads a session of its own, with its output and the file that keeps it."""

    def __init__(self, number: int, process: "subprocess.Popen[bytes]", log: LineFile, logs: Logs) -> None:
        assert process.stdout and process.stderr  # noqa: PT018 (one fact: both are pipes)
        self.number, self.process = number, process
        self._log, self._logs = log, logs
        self._pipes = process.stdout, process.stderr
        self.inboxes = {
            "out": Inbox(process.stdout.fileno(), LONGEST_LINE),
            "err": Inbox(process.stderr.fileno(), LONGEST_LINE),
        }
        self.last_error = ""  # the last line on standard error

    def take(self, kind: str) -> list[str]:
        """Return the lines that have come on one stream, "out" or "err"; the rank's file gets them too."""
        lines = self.inboxes[kind].lines()
        if lines:
            self._logs.put(self._log, lines)
        if kind == "err":
            self.last_error = next((line for line in reversed(lines) if line.strip()), self.last_error)
        return lines

    def note(self, line: str) -> None:
        """Write a line to the rank's file alone."""
        self._logs.put(self._log, [line])

    def end(self) -> int | None:
        """Return the exit status, a signal's number below 0, once the process has ended; what it started ends too."""
        if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        self.signal(signal.SIGKILL)  # before the number can be another process's: loaders, of a rank that was killed
        return self.process.wait()

    def close(self) -> None:
        """Let the pipes go, once the process has ended."""
        for pipe in self._pipes:
            pipe.close()

    def signal(self, number: int) -> None:
        """Signal the process; SIGKILL goes to all processes of its group."""
        with suppress(ProcessLookupError, PermissionError):
            (os.killpg if number == signal.SIGKILL else os.kill)(self.process.pid, number)


class Agent:
    """The ranks of one host, from the job's message to the end of the last rank."""

    def __init__(self) -> None:
        self._orders, self._reports = Inbox(0), Outbox(1)
        self._waits = selectors.DefaultSelector()
        self._ranks: dict[int, RankProcess] = {}
        self._logs = Logs()
        self._heard = time.monotonic()
        self._beat = 0.0
        self._link_limit: float | None = None  # seconds of silence after which the launcher counts as gone
        self._every = BEAT
        self._stop_limit: float | None = None
        self._alone = False  # the launcher is gone
        self._signal: int | None = None  # that this agent itself got
        self._asked = False  # the launcher has asked the ranks to stop
        self._kill_at: float | None = None

    def run(self) -> None:
        """Serve one launcher until all ranks have ended."""
        self._reports.send({"ready": True})
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, *ASK):  # what asks the launch may go to all processes of a job
            signal.signal(number, self._note)
        self._waits.register(Inbox(wake_read), selectors.EVENT_READ, None)
        self._waits.register(self._orders, selectors.EVENT_READ, None)
        started = False
        while self._ranks or not started:
            self._wait()
            for message in self._orders.messages()[0]:
                self._heard = time.monotonic()
                started = self._obey(message) or started
            if (self._orders.closed or self._alone) and not started:
                return
            if self._orders.closed and self._orders in self._waits.get_map():
                self._waits.unregister(self._orders)
            self._collect()
            self._keep_time()
        self._logs.close(LAST_LINES_WITHIN)
        self._send_rest({"done": True})

    def _note(self, number: int, frame: Any) -> None:
        if number != signal.SIGCHLD:
            self._signal = number

    def _wait(self) -> None:
        """Wait until something comes, a process ends, or a second has passed."""
        writes = selectors.EVENT_WRITE if self._reports.is_waiting else 0
        if writes:
            self._waits.register(self._reports.descriptor, writes)
        ready = self._waits.select(timeout=1.0)
        if writes:
            self._waits.unregister(self._reports.descriptor)
            self._reports.flush()
        for key, _ in ready:
            if isinstance(key.fileobj, Inbox) and key.fileobj is not self._orders and key.data is None:
                key.fileobj.lines()  # the signals' pipe

    def _obey(self, message: Message) -> bool:
        """Do what the launcher says; returns whether ranks were started."""
        if "job" in message:
            self._start(message["job"])
            return True
        if "signal" in message:
            number = message["signal"]
            if number == signal.SIGTERM and self._alone:  # they are asked, and may end now, when Python takes no signal
                return False
            self._asked = self._asked or number == signal.SIGTERM
            for rank in self._ranks.values():
                rank.signal(number)
        return False

    def _start(self, job: Message) -> None:
        self._link_limit, self._stop_limit, self._every = job["link_limit"], job["stop_limit"], job["beat"]
        libc, own = ctypes.CDLL(None, use_errno=True), os.getpid()

        def die_with_agent() -> None:
            libc.prctl(_DIE_WITH_PARENT, int(signal.SIGTERM), 0, 0, 0)
            if os.getppid() != own:
                os._exit(1)

        for local, number in enumerate(job["ranks"]):
            environment = os.environ | job["environment"] | {"RANK": str(number), "LOCAL_RANK": str(local)}
            for name in job["unset"]:
                environment.pop(name, None)
            try:
                process = subprocess.Popen(
                    job["command"],
                    cwd=job["folder"],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                    preexec_fn=die_with_agent,
                )
            except OSError as error:
                self._reports.send({"ended": number, "status": REFUSED, "last": f"cannot be started: {error}"})
                continue
            log = LineFile(Path(job["logs"]) / f"{job['log_name']}-{number}.log")
            self._logs.put(log, [job["title"]])
            rank = self._ranks[number] = RankProcess(number, process, log, self._logs)
            for kind, inbox in rank.inboxes.items():
                self._waits.register(inbox, selectors.EVENT_READ, (rank, kind))
        self._logs.start()

    def _collect(self) -> None:
        """Report the ranks' lines, and the ranks that have ended."""
        for rank in list(self._ranks.values()):
            status = rank.end()
            for kind, inbox in rank.inboxes.items():
                for line in rank.take(kind):
                    self._reports.send({"line": line, "of": rank.number, "kind": kind}, may_drop=True)
                # A process that the rank has left behind may hold the other end.
                if (inbox.closed or status is not None) and inbox in self._waits.get_map():
                    self._waits.unregister(inbox)
            if status is not None:
                rank.close()
                del self._ranks[rank.number]
                self._reports.send({"ended": rank.number, "status": status, "last": rank.last_error})
                if status != 0 and self._alone:
                    self._kill_by(ENDS_WITHIN)

    def _keep_time(self) -> None:
        now = time.monotonic()
        if now - self._beat > self._every:
            self._beat = now
            self._reports.send({"alive": True}, may_drop=True)
        silent = self._link_limit is not None and now - self._heard > self._link_limit
        if self._signal is not None:
            self._lose_launcher(f"its agent got {signal.Signals(self._signal).name}")
        elif self._orders.closed:
            self._lose_launcher("the launch has ended, or the connection to it")
        elif silent:
            self._lose_launcher(
                f"nothing came from the launch for {self._link_limit:g} s: it was stopped, or the network was cut"
            )
        if self._kill_at is not None and now > self._kill_at:
            self._kill_at = None
            for rank in self._ranks.values():
                rank.signal(signal.SIGKILL)

    def _lose_launcher(self, why: str) -> None:
        """Ask the ranks to stop with a checkpoint, since nobody supervises them any more; their files say why."""
        if self._alone:
            return
        self._alone = True
        said = f"{why}; its ranks stop after their step and save a checkpoint"
        for rank in self._ranks.values():
            rank.note(f"--- {time.strftime('%Y-%m-%d %H:%M:%S %z')}, the agent of this host: {said}")
            if not self._asked:
                rank.signal(signal.SIGTERM)
        self._reports.send({"alone": said})
        if self._stop_limit is not None:
            self._kill_by(self._stop_limit)

    def _kill_by(self, seconds: float) -> None:
        at = time.monotonic() + seconds
        self._kill_at = at if self._kill_at is None else min(at, self._kill_at)

    def _send_rest(self, last: Message) -> None:
        """Send the last message, and wait some seconds for the launcher to take all."""
        self._reports.send(last)
        deadline = time.monotonic() + ENDS_WITHIN
        while self._reports.is_waiting and time.monotonic() < deadline:
            time.sleep(0.05)
            self._reports.flush()


if __name__ == "__main__":
    Agent().run()
