"""Whole training runs for tests: a tiny model on a few scenes, in processes that may be signalled and killed."""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from cosmos_scale.checkpoint.state import SAVED_AS, newest
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.engine.ranks import free_port
from cosmos_scale.testing.ranks import fork_context

SECONDS = 120.0  # time limit of a run, which takes about ten seconds

TINY: dict[str, Any] = {
    "name": "tiny",
    "precision": "fp32",
    "device": "cpu",
    "model": {
        "embed_dim": 32,
        "pooler_heads": 2,
        "vision": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1, "head_width": 32},
        "text": {"context_length": 32, "width": 32, "layers": 1, "heads": 2},
    },
    "data": {
        "views": {"local_size": 16, "local_crops": 1},
        "captions": {"count": 3},
        "window": 32,
        "workers": 0,
    },
    "optimizer": {"lr": 1e-3, "warmup_steps": 2},
    "ema": {"momentum": 0.9},
    "zero": {"stage": 0},
    "train": {"global_batch": 8, "schedule_steps": 8},
    "checkpoint": {"every": 0},
    "log": {"every": 1, "progress": False},
}


class Finished(NamedTuple):
    """A run's exit statuses by rank (under the launcher: its one status), and what its processes printed."""

    statuses: list[int]
    output: str
    errors: str

    def require(self, status: int) -> "Finished":
        """Fail, with everything printed, unless each process ended with this status."""
        assert set(self.statuses) == {status}, f"{self.statuses}\n{self.output}\n{self.errors}"
        return self


class Launched:
    """A run under way, of one process or several; a context manager that leaves no process behind."""

    def __init__(self, start: Callable[[Path], Sequence[BaseProcess | subprocess.Popen[bytes]]]) -> None:
        """start: starts processes that lead their groups and write files like 0.out and 0.err to the folder given."""
        self._folder = tempfile.TemporaryDirectory()
        self.processes = start(Path(self._folder.name))

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    def signal(self, rank: int, number: signal.Signals, *, whole_group: bool = False) -> None:
        """Signal one rank's process, or the process together with its loader processes."""
        pid = self.processes[rank].pid
        assert pid is not None
        (os.killpg if whole_group else os.kill)(pid, number)

    def kill(self) -> None:
        """End every process, loaders included, at once."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                assert process.pid is not None
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            assert _wait(process, SECONDS) is not None, f"process {process.pid} lives on after SIGKILL"

    def wait(self, timeout: float = SECONDS) -> Finished:
        """Wait for all processes to end; fail where one runs past the time limit."""
        deadline = time.monotonic() + timeout
        statuses = [_wait(process, deadline - time.monotonic()) for process in self.processes]
        finished = Finished([status for status in statuses if status is not None], self.printed(), self._read("err"))
        if None in statuses:
            self.kill()
            raise AssertionError(f"still running after {timeout:.0f} s\n{finished.output}\n{finished.errors}")
        return finished

    def wait_until_ended(self, rank: int, timeout: float = SECONDS) -> None:
        """Wait until one rank's process has ended; fail where it runs past the time limit."""
        if _wait(self.processes[rank], timeout) is None:
            raise AssertionError(f"rank {rank} still runs\n{self._read('out')}\n{self._read('err')}")

    def wait_until_gone(self, timeout: float = SECONDS) -> None:
        """Wait until no process is left in the process groups, whichever process started it."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            assert process.pid is not None
            while _group_lives(process.pid):
                assert time.monotonic() < deadline, f"process group {process.pid} lives on"
                time.sleep(0.05)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float = SECONDS) -> None:
        """Wait for a condition while the run goes on; fail where the run ends before it."""
        deadline = time.monotonic() + timeout
        while not condition():
            ended = any(_wait(process, 0.0) is not None for process in self.processes)
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"waited for {what} in vain\n{self._read('out')}\n{self._read('err')}")
            time.sleep(0.005)

    def printed(self) -> str:
        """Return what all processes have printed so far, their standard error left out."""
        return self._read("out")

    def _read(self, kind: str) -> str:
        files = sorted(Path(self._folder.name).glob(f"*.{kind}"))
        return "".join(file.read_text(errors="replace") for file in files)


def write_run(folder: Path, scenes: SceneShards, **sections: Any) -> Path:
    """Write a tiny run's YAML into a folder, which also becomes its output; sections are merged over TINY."""
    base = folder / "tiny.yaml"
    base.write_text(yaml.safe_dump(TINY))
    places = {"output": str(folder), "data": {"sources": [{"name": "scenes", "shards": str(scenes.train)}]}}
    own = folder / "places.yaml"
    own.write_text(yaml.safe_dump({"extends": "tiny.yaml", **places}))
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"extends": "places.yaml", **sections}))
    return path


def start(run: Path, *overrides: str, ranks: int = 1, program: str = "cosmos_scale.cli.main") -> Launched:
    """Start `cosmos-scale train`, or another program, in one process for each rank, as the launcher would.

    program: as in `start_command`; its command line begins with `train`.
    """
    return start_command("train", str(run), *overrides, ranks=ranks, program=program)


def start_command(*argv: str, ranks: int = 1, program: str = "cosmos_scale.cli.main") -> Launched:
    """Start a command of `cosmos-scale`, or of another program, in one process for each rank, as a launcher would.

    program: a module whose `main` takes the command line and returns the exit status.
    """
    context = fork_context()
    environment = _environment()
    if ranks > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}

    def processes(folder: Path) -> list[BaseProcess]:
        started: list[BaseProcess] = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            arguments = (program, list(argv), environment | own, folder / str(rank))
            process = context.Process(target=_main, args=arguments, daemon=False)
            process.start()
            started.append(process)
        return started

    return Launched(processes)


def train_to_end(run: Path, *overrides: str, ranks: int = 1, program: str = "cosmos_scale.cli.main") -> Finished:
    """Run the training program, or one like it, to its end."""
    with start(run, *overrides, ranks=ranks, program=program) as process:
        return process.wait()


def launch(run: Path, *overrides: str, ranks: int) -> Launched:
    """Start the ranks as a user does: under DeepSpeed's launcher, on a free port of this machine."""
    port = ["--num_accelerators", str(ranks), "--master_port", str(free_port())]
    command = [str(Path(sys.executable).parent / "deepspeed"), *port, "--module", "cosmos_scale.train", str(run)]

    def processes(folder: Path) -> list[subprocess.Popen[bytes]]:
        with (folder / "0.out").open("wb") as out, (folder / "0.err").open("wb") as err:
            return [
                subprocess.Popen(
                    [*command, *overrides], env=_environment(), stdout=out, stderr=err, start_new_session=True
                )
            ]

    return Launched(processes)


def records(run: Path, name: str = "tiny", kind: str = "train") -> list[dict[str, Any]]:
    """Return the records of one kind that a run's metrics.jsonl has so far; an unfinished last line is left out."""
    path = run.parent / name / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def wait_for_step(process: Launched, run: Path, step: int, name: str = "tiny") -> None:
    """Wait until metrics.jsonl has a step."""
    process.wait_until(partial(_has_step, run, step, name), f"step {step}")


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint as {"name|kind": [n] float32}, put together from the ranks' files."""
    from safetensors import safe_open

    manifest = json.loads((folder / "manifest.json").read_text())
    tensors = {}
    for name, entry in manifest["parameters"].items():
        for kind in (*SAVED_AS.values(), "exp_avg", "exp_avg_sq"):
            pieces = []
            for file, _, _ in sorted(entry["pieces"], key=lambda piece: int(piece[1])):
                with safe_open(folder / file, framework="pt") as opened:
                    pieces.append(opened.get_tensor(f"{name}|{kind}"))
            tensors[f"{name}|{kind}"] = torch.cat(pieces)
    return tensors


def last_checkpoint(run: Path, name: str = "tiny") -> Path:
    """Return the newest checkpoint of a run."""
    found = newest(run.parent / name / "checkpoints")
    assert found is not None
    return found


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _has_step(run: Path, step: int, name: str) -> bool:
    return any(record["step"] >= step for record in records(run, name))


def _environment() -> dict[str, str]:
    """Return this process's environment without what a launcher sets; works where the host name does not resolve."""
    of_launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in of_launchers}
    root = str(Path(__file__).resolve().parents[2])
    return kept | {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}


def _main(program: str, argv: list[str], environment: Mapping[str, str], files: Path) -> None:
    """One process of a run: what `python -m PROGRAM ARGV` does after its imports."""
    os.setsid()
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{files}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    status = 1
    try:
        status = import_module(program).main(argv)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()  # multiprocessing does not run them
    sys.exit(status)


def _wait(process: BaseProcess | subprocess.Popen[bytes], seconds: float) -> int | None:
    """Return a process's exit status, None where it still runs after some seconds."""
    if isinstance(process, BaseProcess):
        process.join(max(0.0, seconds))
        return process.exitcode
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None
