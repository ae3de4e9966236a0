"""Whether the system lets this process start more threads (`ulimit -u`, or the limit on the pids of a container).

Programs ask before they import their parts, so this module imports little.
"""

import os
import threading

_MOST_OF_NUMPY = 64  # that numpy's OpenBLAS starts when it is imported


def can_start_threads(count: int) -> bool:
    """Return whether some more threads can run at once. It is tried, since other processes count too."""
    tried = threading.Event()
    threads = [threading.Thread(target=tried.wait, daemon=True) for _ in range(count)]
    started = 0
    try:
        for thread in threads:
            thread.start()
            started += 1
    except (RuntimeError, MemoryError):
        return False
    finally:
        tried.set()
        for thread in threads[:started]:
            thread.join()
    return True


def too_few_threads(more: int = 0) -> str:
    """Return a line where the threads of the libraries, and some more, cannot be started; empty where they can.

    OpenBLAS sends its own process SIGINT where it lacks a thread, and gloo waits for ever.
    """
    needed = _threads_of_numpy() + more
    if can_start_threads(needed):
        return ""
    return (
        f"threads: {needed} more cannot be started; rule: as many must be free for this program (ulimit -u, or the "
        "limit on pids of a container)"
    )


def _threads_of_numpy() -> int:
    """Return how many threads numpy starts beside the main one: OpenBLAS has one for each core, or as it is told."""
    for name in ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"):
        if (told := os.environ.get(name, "")).isdecimal() and int(told) > 0:
            return min(int(told), _MOST_OF_NUMPY) - 1
    return min(len(os.sched_getaffinity(0)), _MOST_OF_NUMPY) - 1
