"""The variable OMP_NUM_THREADS, by which users say how many threads a process computes with.

libgomp reads it when torch is imported. So programs import this module before torch, and it imports little itself.
"""

import os
import sys

VARIABLE = "OMP_NUM_THREADS"
_LARGEST = 2**63 - 1  # that libgomp takes


def drop_wrong_threads(program: str) -> None:
    """Unset OMP_NUM_THREADS where it is no number of threads, such as `auto`, and say so on one line on rank 0.

    libgomp would print a line on every rank, and each rank would take all cores of its host. Without the variable the
    ranks share them.
    """
    said = os.environ.get(VARIABLE)
    if said is None or _is_taken(said):
        return
    del os.environ[VARIABLE]
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{program}: {VARIABLE}: {said!r} counts as unset; rule: a whole number from 1 on",
            file=sys.stderr,
            flush=True,
        )


def _is_taken(said: str) -> bool:
    """Whether libgomp takes a value: a number from 1 on, or several with commas between them, for nested threads."""
    numbers = [number.strip().removeprefix("+") for number in said.split(",")]
    return all(
        number.isascii() and number.isdecimal() and len(number) < 20 and 1 <= int(number) <= _LARGEST
        for number in numbers
    )
