"""A tiny run on two hosts of this machine, started from the first one as users start it, and its losses."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.testing.hosts import HostProgram, NamespaceHost
from cosmos_scale.testing.runs import records, train_to_end, write_run
from tests.conftest import REPOSITORY

STEPS = 80
START = 180.0  # seconds for a start, an end and the steps between, on a busy machine
ENDS_WITHIN = 30.0  # seconds in which all ranks end after the first one that failed
# A rank that trains alone adds up its samples in another order; float32, over tens of steps of Adam.
OTHER_WORLD_SIZE = 1e-5

_BIN = Path(sys.executable).parent
_LAUNCH = [sys.executable, "-m", "cosmos_scale.cli", "launch"]


class TwoHosts:
    """Two hosts, a and b, a run's file, and hostfiles of both hosts and of a alone."""

    def __init__(self, folder: Path, a: NamespaceHost, b: NamespaceHost, scenes: SceneShards) -> None:
        self.a, self.b, self.scenes = a, b, scenes
        self._folder = folder
        self.run = write_run(folder, scenes, train={"global_batch": 8, "schedule_steps": STEPS})
        self.both, self.only_a = folder / "both", folder / "only-a"
        self.both.write_text(f"{a.name} slots=1\n{b.name} slots=1\n")
        self.only_a.write_text(f"{a.name} slots=1\n")
        # DeepSpeed passes on PYTHON* alone of the environment.
        passed = folder / "deepspeed_env"
        passed.write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
        of_tests = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT")
        kept = {name: value for name, value in os.environ.items() if name not in of_tests}
        path = f"{_BIN}:{os.environ['PATH']}"
        self._environment = kept | {"DS_ACCELERATOR": "cpu", "DS_ENV_FILE": str(passed), "PATH": path}
        self._references: dict[int, dict[int, float]] = {}

    def launch(self, *words: str, hosts: Path | None = None) -> HostProgram:
        """Start `cosmos-scale launch`; words: options, and keys of the run."""
        return self._start([*_LAUNCH, "--hostfile", str(hosts or self.both), str(self.run), *words])

    def deepspeed(self, *keys: str, hosts: Path | None = None) -> HostProgram:
        command = [str(_BIN / "deepspeed"), "--hostfile", str(hosts or self.both), "--module", "cosmos_scale.train"]
        return self._start([*command, str(self.run), *keys])

    def script(self, *keys: str) -> HostProgram:
        """Start launchers/hostfile.sh over pdsh."""
        script = str(REPOSITORY / "launchers" / "hostfile.sh")
        return self._start([script, str(self.both), str(self.run), *keys], {"LAUNCHER": "pdsh"})

    def train(self, *keys: str) -> HostProgram:
        """Start one process on host a."""
        return self._start([sys.executable, "-m", "cosmos_scale.cli", "train", str(self.run), *keys])

    def _start(self, command: Sequence[str], more: Mapping[str, str] | None = None) -> HostProgram:
        return self.a.start(command, REPOSITORY, self._folder, self._environment | dict(more or {}))

    def losses(self, name: str) -> list[tuple[int, float]]:
        """The steps and losses that a run has written so far, in this order."""
        return [(record["step"], record["loss"]) for record in records(self.run, name)]

    def wait_for_step(self, program: HostProgram, name: str, step: int) -> None:
        self.wait_until(program, lambda: any(done >= step for done, _ in self.losses(name)), f"step {step}")

    def wait_for_steps(self, program: HostProgram, name: str, count: int) -> None:
        """Wait until a launch has done some steps more than a run has now."""
        self.wait_for_step(program, name, max((step for step, _ in self.losses(name)), default=0) + count)

    def wait_until(
        self, program: HostProgram, condition: Callable[[], bool], what: str, seconds: float = START
    ) -> None:
        """Wait for a condition while a launch goes on."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = program.ended
            if (ended and not condition()) or time.monotonic() > deadline:
                raise AssertionError(f"waited for {what} in vain\n{program.output}\n{program.errors}")
            time.sleep(0.02)

    def reference(self, stage: int) -> dict[int, float]:
        """The losses by step of two ranks on this machine, without hosts and disturbance."""
        if stage not in self._references:
            name = f"local-{stage}"
            train_to_end(self.run, f"name={name}", f"zero.stage={stage}", ranks=2).require(0)
            self._references[stage] = dict(self.losses(name))
            assert list(self._references[stage]) == list(range(1, STEPS + 1))
        return self._references[stage]

    def require_none_left(self, seconds: float = ENDS_WITHIN) -> None:
        """Fail where a process of a launch is left on a host after some seconds."""
        deadline = time.monotonic() + seconds
        while left := [*self.a.processes().values(), *self.b.processes().values()]:
            assert time.monotonic() < deadline, f"processes are left: {left}"
            time.sleep(0.05)

    def files(self, name: str, pattern: str) -> list[str]:
        """The names of files in a run's folder."""
        return sorted(path.name for path in (self.run.parent / name).glob(pattern))
