"""The shared memory of DeepSpeed's ranks on CPUs: it works on without its name, and one line says where it is small."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cosmos_scale.engine.comm_memory import check_room
from cosmos_scale.engine.ranks import free_port, start_ranks
from cosmos_scale.errors import UserError
from cosmos_scale.testing.ranks import run_ranks


def shared_memory(rank: int, world_size: int) -> tuple[list[str], list[str], list[float]]:
    """The names in /dev/shm that the ranks left, the memory that this rank has mapped, and a sum of all ranks."""
    start_ranks("cpu")
    import deepspeed.comm

    prefix = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{os.environ['MASTER_PORT']}_"
    torch.distributed.barrier()
    left = [path.name for path in Path("/dev/shm").glob(f"{prefix}*")]
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = {line.split(prefix)[1] for line in maps if prefix in line}
    values = torch.full((1000,), rank + 1.0)
    deepspeed.comm.inference_all_reduce(values)
    return left, sorted(mapped), values.unique().tolist()


def test_ranks_leave_no_shared_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for left, mapped, total in run_ranks(shared_memory, 2):
        assert left == []
        assert mapped == ["0 (deleted)", "1 (deleted)"]
        assert total == [3.0]


@pytest.mark.parametrize(
    ("size", "free", "said"),
    [
        (64, 64, r"/dev/shm: has 64 MiB, but 2 ranks on CPUs share 132; rule: enlarge it \(docker run --shm-size\)"),
        (1000, 10, r"/dev/shm: has 10 MiB left, but a rank on CPUs needs 66; rule: enlarge it .* or delete what ended"),
        (1000, 100, None),
        (0, 0, None),  # no limit
    ],
)
def test_too_little_shared_memory_is_one_line(
    monkeypatch: pytest.MonkeyPatch, size: int, free: int, said: str | None
) -> None:
    system = SimpleNamespace(f_blocks=size * 2**20, f_frsize=1, f_bavail=free * 2**20)
    monkeypatch.setattr(os, "statvfs", lambda path: system)
    for name in ("RANK", "LOCAL_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    check_room()  # of one rank without a launcher, nothing is needed
    for name, value in {"RANK": "0", "LOCAL_SIZE": "2", "WORLD_SIZE": "2", "MASTER_PORT": "none"}.items():
        monkeypatch.setenv(name, value)
    if said is None:
        check_room()
    else:
        with pytest.raises(UserError, match=said):
            check_room()
