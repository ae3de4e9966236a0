"""The shared memory of DeepSpeed's communication for ranks on CPUs: room for it before, its names deleted after."""

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from cosmos_scale.errors import UserError
from cosmos_scale.host import shared_memory_obstacle
from cosmos_scale.words import counted

_LOG = logging.getLogger(__name__)

_FOLDER = Path("/dev/shm")
_PROCESSES = Path("/proc")
_NAME = "deepspeed_allreduce_buffer_"
_YOUNG = 10.0  # seconds in which a launch's ranks open the memory of each other; a container may hide its processes
_BYTES = 66 * 2**20 + 8  # of each rank: struct allreduce_workspace in DeepSpeed's csrc/cpu/comm/shm.cpp


def sweep() -> None:
    """Delete this user's shared memory that no process has open any more: ended launches left it. Says so."""
    left = []
    for path in _FOLDER.glob(f"{_NAME}{os.getuid()}_*"):
        try:
            status = path.stat()
        except OSError:  # another launch sweeps too
            continue
        if status.st_uid == os.getuid() and abs(time.time() - status.st_mtime) > _YOUNG:  # ahead: the clock was set
            left.append((path, status.st_size))
    in_use = _opened() if left else set()
    removed = [(path, size) for path, size in left if in_use is not None and str(path) not in in_use]
    for path, _ in removed:
        path.unlink(missing_ok=True)
    if removed:
        size = sum(size for _, size in removed) / 2**20
        _LOG.warning("%s: removed %d files (%.0f MiB) that ended launches left", _FOLDER, len(removed), size)


def _opened() -> set[str] | None:
    """Return the shared memory that any process has mapped or open; None where that cannot be told."""
    found: set[str] = set()
    for process in _PROCESSES.iterdir():
        if not process.name.isdigit():
            continue
        try:
            lines = (process / "maps").read_text(errors="replace").splitlines()
            found.update(line[line.index("/") :] for line in lines if _NAME in line)
            for descriptor in (process / "fd").iterdir():
                with suppress(FileNotFoundError):  # it was closed meanwhile
                    found.add(os.readlink(descriptor))
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        except OSError:  # of another user, or one with more rights
            if _may_be_rank(process):
                return None
    return found


def _may_be_rank(process: Path) -> bool:
    """Whether a process that cannot be looked at runs Python and is this user's."""
    try:
        return process.stat().st_uid == os.getuid() and b"python" in (process / "cmdline").read_bytes()
    except OSError:  # it ended meanwhile
        return False


def check_room() -> None:
    """Raise UserError where the host's shared memory is closed to its ranks, or too small: they would die later."""
    if not _in_use():
        return
    if obstacle := shared_memory_obstacle():
        raise UserError(
            f"{_FOLDER}: cannot be written to: {obstacle}; rule: ranks on CPUs share it, so mount one that can (docker "
            "run --shm-size)"
        )
    if not _FOLDER.is_dir():
        return
    system = os.statvfs(_FOLDER)
    size, free = system.f_blocks * system.f_frsize, system.f_bavail * system.f_frsize
    ranks, mib = int(os.environ["LOCAL_SIZE"]), 2**20
    if 0 < size < ranks * _BYTES:  # 0: no limit
        needed = f"{counted(ranks, 'rank on CPUs needs', 'ranks on CPUs need')} {ranks * _BYTES / mib:.0f}"
        raise UserError(
            f"{_FOLDER}: has {size / mib:.0f} MiB, but {needed}; "
            "rule: enlarge it (docker run --shm-size), or start fewer ranks"
        )
    if size and free < _BYTES and not _file().exists():
        raise UserError(
            f"{_FOLDER}: has {free / mib:.0f} MiB left, but a rank on CPUs needs {_BYTES / mib:.0f}; rule: enlarge it "
            "(docker run --shm-size), or delete what ended launches left (deepspeed_allreduce_buffer_*)"
        )


def delete_name() -> None:
    """Delete the name of this rank's shared memory, once all ranks have opened it.

    The memory itself lasts as long as a rank has it mapped. DeepSpeed never deletes the name, so the memory would stay
    when all ranks have ended.
    """
    if _in_use():
        _file().unlink(missing_ok=True)


def _in_use() -> bool:
    """Whether DeepSpeed's communication takes shared memory: it does where all ranks run on one host."""
    return {"RANK", "LOCAL_SIZE"} <= os.environ.keys() and os.environ["LOCAL_SIZE"] == os.environ.get("WORLD_SIZE")


def _file() -> Path:
    """The file of this rank's shared memory, as DeepSpeed's shm_initialize names it."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    return _FOLDER / f"{_NAME}{os.getuid()}_{address}_{port}_{os.environ['RANK']}"
