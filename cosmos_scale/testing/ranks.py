"""Run a function on several gloo ranks of this machine and bring its results back to the test."""

import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed as dist

Result = TypeVar("Result")

# After a first failure, the seconds in which other ranks may report theirs. The rest hang in a collective by then.
_GRACE_SECONDS = 0.5


class RankError(AssertionError):
    """A rank raised, died or ran past the time limit; the text holds the rank's traceback."""


def fork_context() -> ForkServerContext:
    """Return the context whose processes are forked off a server that has imported the slow packages, once for all.

    Processes start clean all the same. The first start of a test process makes the server, so all of them use this.
    """
    context = get_context("forkserver")
    # DeepSpeed chooses its device as it is imported: only where the choice is made, the server imports it.
    chosen = os.environ.get("DS_ACCELERATOR") == "cpu"
    context.set_forkserver_preload(["cosmos_scale.testing.preloaded" if chosen else "torch"])
    return context


def run_ranks(function: Callable[..., Result], world_size: int, *args: object, timeout: float = 120.0) -> list[Result]:
    """Call `function(rank, world_size, *args)` on every rank of a fresh gloo group and return the results by rank.

    function: a module-level function. The function, its arguments and its results are pickled. A launch takes about as
        long as the imports of the function's module, so let one launch serve many cases.
    timeout: seconds for everything, start included. All processes have ended when this function returns or raises.

    In each rank: one thread, the default group initialised over a file store, RANK, LOCAL_RANK and WORLD_SIZE set,
    otherwise this process's environment. Raises RankError.
    """
    context = fork_context()
    call = pickle.dumps((function, args))  # plain bytes, so that no two ranks share a tensor's memory
    deadline = time.monotonic() + timeout
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                job = (call, rank, world_size, Path(folder, "store"), timeout, dict(os.environ), theirs)
                process: BaseProcess = context.Process(target=_rank_main, args=job, name=f"rank {rank}")
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            results: list[Result] = _collect(processes, pipes, deadline)
            for pipe in pipes:
                pipe.send_bytes(b"")  # all have reported: now a rank may end without breaking another's collective
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            return results
        finally:
            for process, pipe in zip(processes, pipes, strict=True):
                process.kill()
                process.join()
                pipe.close()


def _collect(processes: Sequence[BaseProcess], pipes: Sequence[Connection], deadline: float) -> list[Any]:
    """Wait for every rank's report; raise RankError on the first failure or at the deadline."""
    results: dict[int, object] = {}
    failures: dict[int, str] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        if failures:
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        ready = connection.wait(list(waiting.values()), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            pipe = waiting.pop(rank)
            try:
                succeeded, report = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(_GRACE_SECONDS)
                succeeded, report = False, f"ended without a report, exit code {processes[rank].exitcode}"
            if succeeded:
                results[rank] = report
            else:
                failures[rank] = report
    if failures:
        raise RankError("\n".join(f"rank {rank} of {len(pipes)}: {text}" for rank, text in failures.items()))
    if waiting:
        raise RankError(f"ranks {sorted(waiting)} of {len(pipes)} did not report within the time limit")
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    call: bytes,
    rank: int,
    world_size: int,
    store: Path,
    timeout: float,
    environment: dict[str, str],
    pipe: Connection,
) -> None:
    """One rank: join the group, call the function, report, and wait until every rank has reported."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a test machine's host name may not resolve
    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(call)
        dist.init_process_group(
            "gloo", f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        report = pickle.dumps((True, function(rank, world_size, *args)))
    except BaseException:
        report = pickle.dumps((False, traceback.format_exc()))
    # Plain bytes: a tensor sent as an object would lie in shared memory, which ends with this process.
    pipe.send_bytes(report)
    pipe.recv_bytes()
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_with_parent() -> None:
    """End this process when the test process has ended, in whatever way."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
