"""What a process may use of its host: affinity, CPU quotas of control groups of both versions, ranks beside it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cosmos_scale import host
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.host import free_memory, python_command, ranks_of_this_host, usable_cores, uses_gpu
from cosmos_scale.testing.ranks import run_ranks


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/", {}, 16),
        ("0::/", {"cpu.max": "max 100000\n"}, 16),
        ("0::/", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/", {"cpu.max": "5000 100000\n"}, 1),
        ("0::/", {"cpu.max": "6400000 100000\n"}, 16),  # a quota above the affinity
        ("0::/", {"cpu.max": "garbage"}, 16),
        ("0::/pod/box", {"pod/box/cpu.max": "max 100000\n", "pod/cpu.max": "200000 100000\n"}, 2),  # of a group above
        ("0::/hosts/path", {"cpu.max": "300000 100000\n"}, 3),  # only the root is there
        ("4:cpu,cpuacct:/box", {"cpu,cpuacct/box/cpu.cfs_quota_us": "150000\n"}, 2),
        ("4:cpu,cpuacct:/box", {"cpu/cpu.cfs_quota_us": "200000\n"}, 2),
        ("4:cpu,cpuacct:/box", {"cpu,cpuacct/box/cpu.cfs_quota_us": "-1\n"}, 16),
        ("3:memory:/box\n4:cpuset:/box", {"cpuset/box/cpu.cfs_quota_us": "100000\n"}, 16),
        (None, {"cpu.max": "100000 100000\n"}, 16),
    ],
)
def test_cores_are_those_of_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str | None, files: dict[str, str], cores: int
) -> None:
    groups = tmp_path / "groups"
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
        if name.endswith("quota_us"):
            (groups / name).with_name("cpu.cfs_period_us").write_text("100000\n")
    if own is not None:
        (tmp_path / "own").write_text(f"{own}\n")
    monkeypatch.setattr(host, "_GROUPS", groups)
    monkeypatch.setattr(host, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert usable_cores() == cores


def test_either_launcher_says_how_many_ranks_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_of_this_host(unknown=5) == 5
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert ranks_of_this_host(unknown=5) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert ranks_of_this_host(unknown=5) == 4


def threads_of_torch(rank: int, world_size: int) -> int:
    os.environ.pop("OMP_NUM_THREADS")
    os.sched_getaffinity = lambda pid: set(range(12))
    host._OWN_GROUPS = Path("/nowhere")
    start_ranks("cpu")
    return torch.get_num_threads()


@pytest.mark.parametrize(("variable", "threads"), [("LOCAL_WORLD_SIZE", 3), ("LOCAL_SIZE", 3), (None, 12)])
def test_ranks_share_the_cores_under_either_launcher(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, threads: int
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "4")
    assert run_ranks(threads_of_torch, 1) == [threads]


MIB = 2**20


@pytest.mark.parametrize(
    ("own", "files", "mib"),
    [
        ("0::/", {}, 900),  # what is available, and the swap
        ("0::/box", {"box/memory.max": "max\n", "box/memory.current": "5\n", "box/memory.stat": ""}, 900),
        (
            "0::/box",
            {
                "box/memory.max": f"{600 * MIB}\n",
                "box/memory.current": f"{500 * MIB}\n",
                "box/memory.stat": f"anon 1\ninactive_file {50 * MIB}\n",
            },
            150,
        ),
        (
            "0::/pod/box",  # of a group above
            {"pod/memory.max": f"{MIB}\n", "pod/memory.current": f"{2 * MIB}\n", "pod/memory.stat": ""},
            0,
        ),
        (
            "4:memory:/box",
            {
                "memory/box/memory.limit_in_bytes": f"{600 * MIB}\n",
                "memory/box/memory.usage_in_bytes": f"{200 * MIB}\n",
                "memory/box/memory.stat": f"total_inactive_file {100 * MIB}\n",
            },
            500,
        ),
        ("4:memory:/box", {"memory/box/memory.limit_in_bytes": "9223372036854771712\n"}, 900),
        (None, {}, 900),
    ],
)
def test_memory_is_that_of_the_host_and_of_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str | None, files: dict[str, str], mib: int
) -> None:
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    if own is not None:
        (tmp_path / "own").write_text(f"{own}\n")
    (tmp_path / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {800 * 1024} kB\nSwapFree: {100 * 1024} kB\n")
    monkeypatch.setattr(host, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(host, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(host, "_MEMORY", tmp_path / "meminfo")
    assert free_memory() == mib * MIB


@pytest.mark.parametrize(
    ("device", "seen", "expected"),
    [("auto", True, True), ("cuda", True, True), ("cpu", True, False), ("auto", False, False)],
)
def test_a_run_on_cpus_leaves_a_gpu_alone(
    device: str, seen: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: seen)
    assert uses_gpu(device) is expected


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no -P")
@pytest.mark.parametrize("from_folder", [False, True])
def test_a_file_of_the_users_folder_takes_no_librarys_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_folder: bool
) -> None:
    """But where this process itself imports from the folder, as `python -m` does, the other one does too."""
    (tmp_path / "random.py").write_text("raise SystemExit('of the user')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*([str(tmp_path)] if from_folder else []), "/elsewhere"])
    ended = subprocess.run(python_command("tempfile"), capture_output=True, text=True, timeout=30)
    assert ended.stderr == ("of the user\n" if from_folder else "")
