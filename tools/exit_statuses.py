"""Start many short training runs on a busy machine and count their exit statuses: all should be 0.

    python tools/exit_statuses.py --runs 1000

Each run trains a tiny model for two steps, saves a checkpoint, and ends as `cosmos-scale train` does. The runs are
forked off this process, which has imported the slow packages once. Beside the runs a process spins on each core.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from cosmos_scale.cli.arguments import positive
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.cli.main import main as command
from cosmos_scale.data.scenes.scene_shards import build_scenes
from cosmos_scale.engine.ranks import free_port
from cosmos_scale.host import usable_cores
from cosmos_scale.testing.runs import write_run

SECONDS = 300.0  # time limit of a run

# Gives gloo's workers the processor only when nobody else wants it, so that they are late at the end of most runs.
STARVE = r"""
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
extern "C" int pthread_setname_np(pthread_t thread, const char* name) {
  static auto real = (int (*)(pthread_t, const char*))dlsym(RTLD_NEXT, "pthread_setname_np");
  if (strstr(name, "gloo_runloop")) { struct sched_param p = {0}; sched_setscheduler(0, SCHED_IDLE, &p); }
  return real(thread, name);
}
"""


def count_statuses(runs: int, ranks: int, overrides: Sequence[str]) -> Counter[int]:
    """Train so many runs one after the other; return how many processes ended with each exit status (-N: signal N)."""
    import deepspeed  # noqa: F401 (here, before the forks: the import takes seconds)

    import cosmos_scale.train  # noqa: F401 (the same)

    statuses: Counter[int] = Counter()
    with _folder() as root, _busy_cores():
        scenes = build_scenes(root, train=16, gallery=4, workers=1)
        for number in range(runs):
            folder = root / str(number)
            folder.mkdir()
            run = write_run(folder, scenes)
            ended = _run([str(run), "train.max_steps=2", *overrides], ranks, folder / "output")
            statuses.update(ended)
            if set(ended) != {0}:
                print(f"run {number}: {ended}\n{(folder / 'output').read_text(errors='replace')}", flush=True)
            elif (number + 1) % 50 == 0:
                print(f"{time.strftime('%H:%M:%S')} {number + 1} runs: {dict(statuses)}", flush=True)
    return statuses


def _run(arguments: Sequence[str], ranks: int, output: Path) -> list[int]:
    """Train one run to its end and return its ranks' exit statuses."""
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            signal.alarm(int(SECONDS))
            if ranks > 1:
                os.environ.update(places, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_SIZE=str(ranks))
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for descriptor in (1, 2):
                os.dup2(file, descriptor)
            leave_after(partial(command, ["train", *arguments]))
        processes.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


@contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder. The exit of a forked process would delete one of tempfile.TemporaryDirectory."""
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def _busy_cores() -> Iterator[None]:
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(usable_cores())]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def _start_starved() -> int:
    """Run this program again, on one core and with gloo's workers starved; return its exit status."""
    with tempfile.TemporaryDirectory() as name:
        source, library = Path(name, "starve.cpp"), Path(name, "starve.so")
        source.write_text(STARVE)
        subprocess.run(["g++", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        again = [sys.executable, __file__, *(word for word in sys.argv[1:] if word != "--starve")]
        return subprocess.run(again, env={**os.environ, "LD_PRELOAD": str(library)}, check=False).returncode


def main() -> int:
    """Run the command line; returns 1 where a process ended with another status than 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=positive, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--ranks", type=positive, default=1, metavar="N", help="of each run (default: 1)")
    parser.add_argument("--starve", action="store_true", help="keep gloo's workers off the processor, on one core")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="keys of the runs")
    arguments = parser.parse_args()
    if arguments.starve:
        return _start_starved()
    os.environ.update(DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    statuses = count_statuses(arguments.runs, arguments.ranks, arguments.overrides)
    print(json.dumps({"processes": statuses.total(), "statuses": statuses}))
    return 0 if set(statuses) == {0} else 1


if __name__ == "__main__":
    leave_after(main)
