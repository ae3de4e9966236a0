"""Work over processes: results in order, jobs read only as far as needed, one line on a killed worker."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from cosmos_scale.data import jobs
from cosmos_scale.data.jobs import map_jobs, progress_bar
from cosmos_scale.errors import UserError


def square(number: int) -> int:
    return number * number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [None, 1, 2])
def test_results_come_in_order(workers: int | None) -> None:
    assert list(map_jobs(square, range(50), workers)) == [number * number for number in range(50)]


def test_jobs_are_read_as_they_are_needed() -> None:
    read: list[int] = []

    def jobs() -> Iterator[int]:
        for number in range(1000):
            read.append(number)
            yield number

    results = map_jobs(square, jobs(), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(read) < 20
    results.close()  # type: ignore[attr-defined]


def test_no_more_processes_are_started_than_there_are_jobs() -> None:
    results = map_jobs(square, range(3), 40)
    assert next(results) == 0
    assert len(multiprocessing.active_children()) <= 3
    assert list(results) == [1, 4]
    assert list(map_jobs(square, range(0), 40)) == []


def test_a_killed_worker_is_one_line() -> None:
    with pytest.raises(UserError, match="a worker process was killed"):
        list(map_jobs(die, range(4), 2))


def stop(number: int) -> int:
    os.kill(os.getpid(), signal.SIGSTOP)
    return number


def test_a_stopped_worker_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_STOPPED_SECONDS", 1.0)
    with pytest.raises(UserError, match=r"worker process \d+ was stopped \(SIGSTOP\) for 1 s, and is ended; rule: "):
        list(map_jobs(stop, range(4), 2))
    assert multiprocessing.active_children() == []


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("counting", 3, show=True) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


def wait_in_a_file(path: Path) -> None:
    try:
        path.write_text("begun")  # inside: the test sends the interrupt as soon as the file is there
        time.sleep(60)
    finally:
        path.unlink(missing_ok=True)


def test_an_interrupt_ends_workers_without_a_word_and_cleaned_up(tmp_path: Path) -> None:
    """As a terminal sends it: to the process and its workers at once, while jobs wait that no worker has yet."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from cosmos_scale.data.jobs import map_jobs\n"
        "from tests.data.test_jobs import wait_in_a_file\n"
        f"try: list(map_jobs(wait_in_a_file, [Path({str(tmp_path)!r}, name) for name in 'abcdefgh'], 2))\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=30) == ("interrupted\n", "")
        assert list(tmp_path.iterdir()) == []
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def do_interrupted(line: int) -> None:
    """In a worker: do a job, with an interrupt just before the line of that number, from 0, which `_do` comes to."""
    signal.signal(signal.SIGINT, jobs._leave)
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal left
        if frame.f_code is not jobs._do.__code__:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                os.kill(os.getpid(), signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        jobs._do(square, line)
    except BaseException:
        os._exit(1)  # would be taken for the job's error, and the worker goes on
    os._exit(0)


def test_an_interrupt_ends_a_worker_at_each_line_around_its_job() -> None:
    """One that came between a job's end and the worker's own bookkeeping would leave the worker to the next job."""
    context = multiprocessing.get_context("fork")
    statuses: list[int | None] = []
    while 0 not in statuses and len(statuses) < 20:
        process = context.Process(target=do_interrupted, args=(len(statuses),))
        process.start()
        process.join(30)
        statuses.append(process.exitcode)
    assert len(statuses) > 4
    assert statuses == [130] * (len(statuses) - 1) + [0]


def test_without_shared_memory_the_process_does_the_jobs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "shared_memory_obstacle", lambda: "Read-only file system")
    assert set(map_jobs(own_number, range(4), 2)) == {os.getpid()}


def test_where_threads_cannot_be_started_the_process_does_the_jobs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `ulimit -u`: the system allows some of what the pool needs."""
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def refused(thread: threading.Thread) -> None:
        if len(started) == 4:
            raise RuntimeError("can't start new thread")
        start(thread)
        started.append(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert set(map_jobs(own_number, range(4), 2)) == {os.getpid()}
    assert not any(thread.is_alive() for thread in started)


def own_number(job: int) -> int:
    return os.getpid()


def test_workers_ignore_an_interrupt_that_their_parent_ignores(tmp_path: Path) -> None:
    """Shells start what a script puts in the background so; the terminal's interrupt comes to all of it."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from cosmos_scale.data.jobs import map_jobs\n"
        "from tests.data.test_jobs import interrupt_itself\n"
        "print(list(map_jobs(interrupt_itself, [1, 2, 3], 2)))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (ended.stdout, ended.stderr) == ("[1, 2, 3]\n", "")


def interrupt_itself(job: int) -> int:
    os.kill(os.getpid(), signal.SIGINT)
    return job
