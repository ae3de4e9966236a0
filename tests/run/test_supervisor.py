"""Ranks whose launcher is killed: they stop with a checkpoint, and leave port and folder to the next launch."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.engine.ranks import free_port
from cosmos_scale.run.lock import LOCK_FILE
from cosmos_scale.testing.runs import SECONDS, last_checkpoint, launch, records, wait_for_step, write_run
from tests.conftest import REPOSITORY

# Its command line names a launcher, and so does that of DeepSpeed's.
LAUNCHER = "import subprocess, sys; assert sys.argv[1]; sys.exit(subprocess.run(sys.argv[2:]).returncode)"


# In the place of `deepspeed --hostfile` with its ssh, and of a rank that it has started.
RUNNER = """
import socket, sys, time
connection = socket.create_connection((sys.argv[2], int(sys.argv[3])))
time.sleep(300)
"""
RANK = """
import signal, sys
from cosmos_scale.run.supervisor import stop_with_launcher
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
stop_with_launcher()
print("watches", flush=True)
signal.pause()
"""
# Either runs what stands after its --.
ABOVE = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[sys.argv.index('--') + 1 :]).returncode)"
ASKS = "from cosmos_scale.run.supervisor import refuse_missing_hostfile; refuse_missing_hostfile()"


@pytest.fixture
def run(tmp_path: Path, scenes: SceneShards) -> Path:
    """A run that does not come to its end here."""
    return write_run(tmp_path, scenes, train={"global_batch": 8, "schedule_steps": 4000}, checkpoint={"every": 0})


def wait_for_release(run: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while (run.parent / "tiny" / LOCK_FILE).read_text():
        assert time.monotonic() < deadline, "the rank trains on"
        time.sleep(0.1)


def test_a_rank_whose_launcher_is_killed_stops_with_a_checkpoint(run: Path, tmp_path: Path) -> None:
    rank = [sys.executable, "-m", "cosmos_scale.cli", "train", str(run)]
    own = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    own |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    with (tmp_path / "out").open("wb") as out:
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, "deepspeed.launcher.launch", *rank],
            env=os.environ | own | {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + SECONDS
        while len(records(run)) < 2:
            assert time.monotonic() < deadline, (tmp_path / "out").read_text()
            time.sleep(0.05)
        launcher.kill()
        launcher.wait()
        wait_for_release(run)
    finally:
        launcher.kill()
        if any(tmp_path.glob("tiny/launch.lock")) and (tmp_path / "tiny" / LOCK_FILE).read_text():
            os.killpg(launcher.pid, signal.SIGKILL)
    assert last_checkpoint(run).name == f"step-{records(run)[-1]['step']:08d}"
    assert "of 4000: SIGTERM" in (tmp_path / "out").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["runner", "launcher of the host"])
def test_ranks_of_deepspeed_stop_when_it_is_killed(run: Path, killed: str) -> None:
    with launch(run, ranks=2) as process:
        wait_for_step(process, run, 2)
        runner = process.processes[0].pid
        (child,) = Path(f"/proc/{runner}/task/{runner}/children").read_text().split()
        os.kill(int(child) if killed != "runner" else int(str(runner)), signal.SIGKILL)
        wait_for_release(run)
        process.wait()
    assert last_checkpoint(run).name == f"step-{records(run)[-1]['step']:08d}"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_rank_finds_the_launcher_at_the_other_end_of_its_ssh_connection(address: str) -> None:
    """deepspeed --hostfile alone is killed: pdsh, ssh and all that is above the rank on its host live on."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        server = socket.create_server((address, 0), family=family)
    except OSError as error:
        pytest.skip(f"{address}: {error.strerror}")
    with server:
        port = server.getsockname()[1]
        runner = subprocess.Popen([sys.executable, "-c", RUNNER, "deepspeed", address, str(port)])
        connection, (client, client_port, *_) = server.accept()
        variables = {"RANK": "1", "SSH_CONNECTION": f"{client} {client_port} {address} {port}"}
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, "deepspeed.launcher.launch", sys.executable, "-c", RANK],
            env=os.environ | variables | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert launcher.stdout is not None
        try:
            assert launcher.stdout.readline() == b"watches\n"
            assert launcher.poll() is None
            runner.kill()
            assert launcher.wait(SECONDS) == 7
        finally:
            runner.kill()
            runner.wait()
            connection.close()
            launcher.stdout.close()
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()


@pytest.mark.parametrize("words", [["--hostfile", "hosts"], ["--hostfile=hosts"], ["-H", "hosts"]])
def test_a_hostfile_that_is_missing_is_refused(tmp_path: Path, words: list[str]) -> None:
    """deepspeed warns, and trains on its own host alone."""

    def asked() -> "subprocess.CompletedProcess[str]":
        python = [sys.executable, "-c"]
        rank = [*python, ABOVE, "deepspeed.launcher.launch", "--", *python, ASKS]
        return subprocess.run(
            [*python, ABOVE, "deepspeed", *words, "--", *rank],
            cwd=tmp_path,
            env=os.environ | {"RANK": "0", "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    assert (
        f"UserError: deepspeed --hostfile: {tmp_path}/hosts is no file, so that deepspeed has started" in asked().stderr
    )
    (tmp_path / "hosts").write_text("worker-a slots=1\n")
    assert (asked().returncode, asked().stderr) == (0, "")
