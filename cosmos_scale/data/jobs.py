"""Independent pieces of work over worker processes, with a progress bar on a terminal.

Lies in no room of `data`: the long work of every room (indexing, verifying, preparing, scenes) uses it.
"""

import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cosmos_scale.console import make_console
from cosmos_scale.data.forked import leave_parents_garbage, no_collection
from cosmos_scale.errors import UserError
from cosmos_scale.files import read_regular
from cosmos_scale.host import shared_memory_obstacle, usable_cores
from cosmos_scale.threads import can_start_threads

Job = TypeVar("Job")
Result = TypeVar("Result")

_AHEAD = 4  # jobs in flight per worker: enough that no worker waits, few enough that results do not pile up
_WATCH_SECONDS = 0.5
_STOPPED_SECONDS = 30.0  # that a worker may be stopped while this process goes on
_FILES_AT_LEAST, _FILES_A_WORKER = 32, 4  # open files that a pool of processes is sure to get along with


def map_jobs(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int | None) -> Iterator[Result]:
    """Yield function(job) for each job, in the jobs' order; jobs are read only as far ahead as needed.

    function, jobs and results must be picklable. workers: processes, of which no more than there are jobs are started;
    None: one per usable core; 0 or 1: this process, and so where the process may open only a few files (ulimit -n) or
    start only a few processes (ulimit -u), or processes cannot share locks (/dev/shm).
    Raises: what `function` raises; UserError where a worker process is killed, or stays stopped.
    """
    if workers is None:
        workers = usable_cores()
    if workers <= 1:
        yield from map(function, jobs)
        return
    waiting = iter(jobs)
    first = list(islice(waiting, _AHEAD * workers))
    workers = min(workers, max(1, len(first)))  # the pool would start all of them, however few jobs there are
    # Starting processes needs open files; where the system has too few, a process that lacks one would wait for ever.
    few_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] < _FILES_AT_LEAST + _FILES_A_WORKER * workers
    if not first or few_files or shared_memory_obstacle() or _few_processes(workers):
        yield from map(function, chain(first, waiting))
        return
    do = partial(_do, function)
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(os.getpid(),)) as pool:
        running: deque[Future[Result]] = deque()
        try:
            with no_collection():  # the first one forks the processes
                running.extend(pool.submit(do, job) for job in first)
            first.clear()
            while running:
                yield _result(running.popleft())
                running.extend(pool.submit(do, job) for job in islice(waiting, 1))
        except BrokenProcessPool as error:
            raise UserError(
                f"a worker process was killed (out of memory?); use fewer workers than {workers}"
            ) from error
        finally:
            # The pool's thread drops the waiting jobs. It ends with a traceback where it meets a job that another
            # thread has dropped after an interrupt ended a worker.
            pool.shutdown(cancel_futures=True)


def _few_processes(workers: int) -> bool:
    """Return whether the system refuses what a pool starts: a pool of which a part starts may wait for ever.

    Tried with threads, which count as processes do: two of the pool, and for each worker its process and one thread.
    """
    return not can_start_threads(2 + 2 * workers)


def _result(future: "Future[Result]") -> Result:
    """Wait for a job's result; raises UserError where a worker has been stopped, and this process has not, for long."""
    looks = 0
    while not wait([future], _WATCH_SECONDS).done:
        stopped = [child for child in multiprocessing.active_children() if _is_stopped(child.pid)]
        looks = looks + 1 if stopped else 0
        if looks * _WATCH_SECONDS >= _STOPPED_SECONDS:
            for child in stopped:
                child.kill()  # or the pool would wait for it
            raise UserError(
                f"worker process {stopped[0].pid} was stopped (SIGSTOP) for {_STOPPED_SECONDS:g} s, and is ended; "
                "rule: stop this process with its workers, or none of them"
            )
    return future.result()


def _is_stopped(pid: int | None) -> bool:
    with suppress(OSError):
        return read_regular(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()[0] == b"T"
    return False


_busy = False  # in a worker: whether it does a job now


def _start_worker(parent: int) -> None:
    leave_parents_garbage()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # the parent goes on after an interrupt, so go on too
        signal.signal(signal.SIGINT, _leave)
    _end_with_parent(parent)


def _leave(*_: object) -> None:
    """In a worker: end at an interrupt, which its parent got too and tells; first a job cleans up after itself."""
    if _busy:
        raise KeyboardInterrupt
    os._exit(130)


def _do(function: Callable[[Job], Result], job: Job) -> Result:
    """In a worker: do a job. Wherever an interrupt comes, `_leave` or this function ends the worker.

    An error that leaves this function would be sent to the parent as the job's, and the worker would take the next job.
    """
    global _busy
    try:
        try:
            _busy = True
            return function(job)
        finally:
            _busy = False
    except KeyboardInterrupt:
        os._exit(130)


def _end_with_parent(parent: int) -> None:
    """In a worker: end soon after the process that started the worker, which may be killed without a word.

    Otherwise a worker would wait for its next job for ever, since the other workers keep the queue open.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def progress_bar(label: str, total: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """Draw a bar on stderr if stderr is a terminal and `show` is true; yields a function that takes each advance."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = make_console(stderr=True)
    shown = show and sys.stderr.isatty()
    # Drawn at each advance, not by a thread: workers are forked while the bar stands, and a lock that the thread held
    # at a fork would stay locked in the worker.
    with Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not shown,
        auto_refresh=False,
    ) as bar:
        task = bar.add_task(label, total=total)

        def advance(steps: int) -> None:
            bar.advance(task, steps)
            bar.refresh()

        yield advance
