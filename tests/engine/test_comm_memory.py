"""The shared memory of DeepSpeed's ranks on CPUs: it works on without its name, and one line says where it is small."""

import mmap
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cosmos_scale.engine import comm_memory
from cosmos_scale.engine.comm_memory import check_room, sweep
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
        (64, 64, r"/dev/shm: has 64 MiB, but 2 ranks on CPUs need 132; rule: enlarge it \(docker run --shm-size\)"),
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


def test_shared_memory_that_is_closed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm_memory, "shared_memory_obstacle", lambda: "Permission denied")
    for name in ("RANK", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    check_room()
    for name, value in {"RANK": "0", "LOCAL_SIZE": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^/dev/shm: cannot be written to: Permission denied; rule: ranks on CPUs .*$"):
        check_room()


def test_what_ended_launches_left_is_swept_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Left behind are two files. Others are open, mapped, too young to tell, or of other names."""
    monkeypatch.setattr(comm_memory, "_FOLDER", tmp_path)
    user = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_29500_"
    names = [f"{user}{rank}" for rank in range(4)]
    young, other, of_another_user = f"{user}9", "other", f"deepspeed_allreduce_buffer_{os.getuid() + 1}_x_1_0"
    for name in (*names, young, other, of_another_user):
        (tmp_path / name).write_bytes(bytes(2**20))
        if name != young:
            # Ahead: the clock was set back since.
            os.utime(tmp_path / name, (time.time() + (60.0 if name == names[2] else -60.0),) * 2)
    with (tmp_path / names[0]).open("rb"):
        with (tmp_path / names[1]).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        sweep()
    assert {path.name for path in tmp_path.iterdir()} == {names[0], names[1], young, other, of_another_user}
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: removed 2 files (2 MiB) that ended launches left"
    ]
    mapped.close()


@pytest.mark.parametrize(("program", "swept"), [("python", False), ("init", True)])
def test_nothing_is_swept_where_a_rank_may_not_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, swept: bool
) -> None:
    monkeypatch.setattr(comm_memory, "_FOLDER", tmp_path)
    monkeypatch.setattr(comm_memory, "_PROCESSES", tmp_path / "processes")
    process = tmp_path / "processes" / "1"
    (process / "maps").mkdir(parents=True)  # to read it is an error, though another one than of rights
    (process / "cmdline").write_text(f"/usr/bin/{program}\0-m\0train")
    left = tmp_path / f"deepspeed_allreduce_buffer_{os.getuid()}_x_1_0"
    left.touch()
    os.utime(left, (0.0, 0.0))
    sweep()
    assert left.exists() != swept
