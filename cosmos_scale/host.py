"""What this process may use of its host: cores and memory, and how many of a run's ranks share them; its age."""

import math
import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_MEMORY = Path("/proc/meminfo")


def ranks_of_this_host(*, unknown: int) -> int:
    """Return how many of the ranks run on this host, as torchrun or DeepSpeed's launcher says; else `unknown`."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or unknown)


def uses_gpu(device: str) -> bool:
    """Tell whether the ranks of a run compute on GPUs. device: as the config has it, auto, cpu or cuda."""
    return device != "cpu" and torch.cuda.is_available()


def shared_memory_obstacle() -> str | None:
    """Return why processes here cannot share memory and locks, such as a /dev/shm that is read-only; None: they can."""
    try:
        multiprocessing.get_context("fork").Lock()
    except OSError as error:
        return error.strerror or type(error).__name__
    return None


def python_command(module: str) -> list[str]:
    """Return the command that runs a module of this package by this interpreter, as `python -m` does.

    Where this process imports nothing from the current folder, the other one does not either: a file of a user there,
    such as random.py, takes no library's place. (Python 3.10 has no such option.)
    """
    apart = sys.version_info >= (3, 11) and not {"", os.getcwd()} & set(sys.path)
    return [sys.executable, *(["-P"] if apart else []), "-m", module]


def process_seconds() -> float:
    """Return for how long this process has run."""
    started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]  # in ticks since the host's start
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(started) / os.sysconf("SC_CLK_TCK")


def usable_cores() -> int:
    """Return the cores that this process may use, at least 1: its affinity, and the CPU quota of its control group.

    A quota is what `docker run --cpus` and Kubernetes' limits set. A part of a core counts as a core.
    """
    cores = len(os.sched_getaffinity(0))
    quota = min((_quota(folder) for folder in _control_groups("cpu")), default=math.inf)
    return max(1, cores if math.isinf(quota) else min(cores, math.ceil(quota)))


def free_memory() -> int:
    """Return the bytes of memory that processes may still take: the host's with its swap, or less by a limit.

    Limits are those of this process's control groups: what `docker run --memory`, Kubernetes and SLURM set. Memory that
    only caches files counts as free.
    """
    host = 0
    for line in _MEMORY.read_text().splitlines():
        name, _, kib = line.partition(":")
        if name in ("MemAvailable", "SwapFree"):
            host += int(kib.split()[0]) * 1024
    return int(min([host, *(_left(folder) for folder in _control_groups("memory"))]))


def _control_groups(controller: str) -> list[Path]:
    """Return the folders of this process's control groups of a controller and all groups above, of both versions."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root = _GROUPS  # version 2
        elif controller in controllers.split(","):
            root = _GROUPS / controllers if (_GROUPS / controllers).is_dir() else _GROUPS / controller  # version 1
        else:
            continue
        # In a container the path may be the host's, of which only the root is to be seen here.
        group = root / path.lstrip("/")
        folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return folders


def _left(group: Path) -> float:
    """Return the bytes that a control group leaves to its processes; inf where it has no limit."""
    try:
        if (group / "memory.max").is_file():  # version 2: "max", or bytes
            limit, used, cached = "memory.max", "memory.current", "inactive_file"
        else:
            limit, used, cached = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        left = int((group / limit).read_text()) - int((group / used).read_text())  # "max" is no number
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, left + int(statistics.get(cached, 0)))
    except (OSError, ValueError):
        return math.inf


def _quota(group: Path) -> float:
    """Return how many cores' time a control group may use; inf where it has no quota."""
    try:
        if (group / "cpu.max").is_file():  # version 2: "max 100000", or microseconds of each period
            allowed, period = (group / "cpu.max").read_text().split()
        else:
            allowed = (group / "cpu.cfs_quota_us").read_text()  # version 1: -1, or microseconds of each period
            period = (group / "cpu.cfs_period_us").read_text()
        cores = float(allowed) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number
        return math.inf
    return cores if cores > 0 else math.inf
