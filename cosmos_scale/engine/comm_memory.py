"""The shared memory of DeepSpeed's communication for ranks on CPUs: room for it before, its names deleted after."""

import os
from pathlib import Path

from cosmos_scale.errors import UserError

_FOLDER = Path("/dev/shm")
_BYTES = 66 * 2**20 + 8  # of each rank: struct allreduce_workspace in DeepSpeed's csrc/cpu/comm/shm.cpp


def check_room() -> None:
    """Raise UserError where the host's shared memory is too small for its ranks: they would die of SIGBUS later."""
    if not _in_use() or not _FOLDER.is_dir():
        return
    system = os.statvfs(_FOLDER)
    size, free = system.f_blocks * system.f_frsize, system.f_bavail * system.f_frsize
    ranks, mib = int(os.environ["LOCAL_SIZE"]), 2**20
    if 0 < size < ranks * _BYTES:  # 0: no limit
        raise UserError(
            f"{_FOLDER}: has {size / mib:.0f} MiB, but {ranks} ranks on CPUs share {ranks * _BYTES / mib:.0f}; rule: "
            "enlarge it (docker run --shm-size), or start fewer ranks"
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
    return _FOLDER / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{os.environ['RANK']}"
