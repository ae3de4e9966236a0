"""What a process's collectives have come to, in words: for the file that a run leaves which stands still."""

import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import torch.distributed as dist

_PACKAGE = Path(__file__).resolve().parents[1]
_OF_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")  # where their functions are defined


def describe_collectives(groups: Mapping[str, dist.ProcessGroup]) -> list[str]:
    """Return lines: the collective that the main thread waits in, and how many it has begun in each group.

    groups: by their names. A rank that has begun fewer than the others is the one that they wait for. On a GPU the host
    runs ahead of its collectives: there the numbers are of what was handed to NCCL.
    """
    return [f"last collective: {_under_way()}"] + [
        f"collectives begun in {name}: {_begun(group)}" for name, group in groups.items()
    ]


def _begun(group: dist.ProcessGroup) -> int | str:
    try:
        number: int = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    except RuntimeError as error:  # of a backend that does not count
        return f"unknown ({str(error).splitlines()[0]})"
    return number


def _under_way() -> str:
    """Name the collective of torch or DeepSpeed that the main thread is in, and our line that has called it."""
    identity = threading.main_thread().ident
    frame: FrameType | None = None if identity is None else sys._current_frames().get(identity)
    called = ""
    while frame is not None:
        code = frame.f_code
        if any(part in code.co_filename for part in _OF_COLLECTIVES) and code.co_name != "wrapper":
            called = code.co_name  # the outermost of them is what our line calls
        elif called and Path(code.co_filename).is_relative_to(_PACKAGE):
            place = Path(code.co_filename).relative_to(_PACKAGE.parent)
            return f"{called}, called in {place}, line {frame.f_lineno}, has not come back"
        frame = frame.f_back
    return "all that the main thread has called have come back"
