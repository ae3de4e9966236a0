"""Launches over ssh: to this machine, under two names."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cosmos_scale.cli.main import main
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.exit_status import FAILED, FINISHED, REFUSED, STOPPED
from cosmos_scale.testing.runs import records, write_run
from tests.conftest import REPOSITORY
from tests.launch.launches import launched, lives
from tests.launch.sshd import MISSING, NAMES, SERVER, two_hosts, write_hostfile
from tests.launch.test_launch import launch

pytestmark = pytest.mark.skipif(SERVER is None, reason=MISSING)

HOSTS = [[[name, 1] for name in NAMES]]


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with two_hosts(tmp_path / "hosts-of-test") as programs:
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        yield


@pytest.mark.usefixtures("on_path")
def test_ranks_of_two_hosts_are_started_stopped_and_ended(tmp_path: Path) -> None:
    with launched(tmp_path / "run", "*:variables", "*:say~here", "*:wait", hosts=HOSTS) as running:
        pids = [running.pid_of(rank) for rank in range(2)]
        running.signal(signal.SIGUSR1)
        ended = running.end().require(STOPPED)
    assert not any(map(lives, pids))
    variables = json.loads((tmp_path / "run" / "variables-1").read_text())
    assert [variables[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == [
        "1",
        "0",
        "2",
        "1",
    ]
    assert "2 ranks on worker-a (1), worker-b (1); they meet at" in ended.errors
    assert (tmp_path / "run" / "logs" / "worker-b-1.log").read_text().splitlines()[1:] == ["here"]


@pytest.mark.usefixtures("on_path")
def test_a_signal_to_all_processes_of_a_launch_loses_no_host(tmp_path: Path) -> None:
    with launched(tmp_path / "run", "*:wait", hosts=HOSTS) as running:
        for rank in range(2):
            running.pid_of(rank)
        clients = children_of(running.process.pid)
        assert all(any(name.encode() in command_of(pid) for pid in clients) for name in NAMES)
        # The launcher learns of all of it in one moment, however long this process waits for a core in between.
        os.kill(running.process.pid, signal.SIGSTOP)
        for pid in (*clients, running.process.pid):
            os.kill(pid, signal.SIGUSR1)  # it ends ssh
        os.kill(running.process.pid, signal.SIGCONT)
        ended = running.end().require(STOPPED)
    assert (tmp_path / "run" / "saved-0").exists()
    assert (tmp_path / "run" / "saved-1").exists()
    assert " lost" not in ended.errors


@pytest.mark.usefixtures("on_path")
def test_a_dead_rank_of_another_host_is_named_and_ends_all(tmp_path: Path) -> None:
    with launched(tmp_path / "run", "*:wait", hosts=HOSTS, restarts=0) as running:
        pids = [running.pid_of(rank) for rank in range(2)]
        os.kill(pids[1], signal.SIGKILL)
        ended = running.end().require(FAILED)
    assert ended.errors.count("rank 1 on host worker-b was ended by SIGKILL") == 1
    assert not any(map(lives, pids))


@pytest.mark.usefixtures("on_path")
def test_ranks_of_all_hosts_stop_with_a_checkpoint_when_the_launcher_is_killed(tmp_path: Path) -> None:
    with launched(tmp_path / "run", "*:wait", hosts=HOSTS) as running:
        pids = [running.pid_of(rank) for rank in range(2)]
        running.process.kill()
        running.wait_for("saved-0", "saved-1")
        running.wait_until(lambda: not any(map(lives, pids)), "the ranks' end")


@pytest.mark.usefixtures("on_path")
def test_a_host_that_cannot_be_reached_is_lost_by_name(tmp_path: Path) -> None:
    hosts = [[["worker-a", 1], ["no-such-host.invalid", 1]], [["worker-a", 1]]]
    with launched(tmp_path / "run", "0!:wait", hosts=hosts) as running:
        ended = running.end().require(FINISHED)
    assert "host no-such-host.invalid is lost (ssh: Could not resolve hostname no-such-host.invalid" in ended.errors
    assert "1 of 2 ranks go on" in ended.errors


@pytest.mark.slow
@pytest.mark.usefixtures("on_path")
def test_hosts_are_looked_at_over_ssh(
    tmp_path: Path, scenes: SceneShards, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path, scenes)
    hosts = write_hostfile(tmp_path, 1, 1)
    assert main(["launch", "--check", "--hostfile", str(hosts), str(run)]) == FINISHED
    table = " ".join(capfd.readouterr().out.split())
    assert "hosts ok 2 hosts answered" in table
    assert f"output ok {tmp_path}/tiny is shared and can be written to" in table
    assert "network ok the ranks meet at 127.0.0.1:" in table
    assert "GLOO_SOCKET_IFNAME=lo, NCCL_SOCKET_IFNAME==lo" in table
    hosts.write_text(hosts.read_text() + "no-such-host.invalid slots=2\n")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    assert main(["launch", "--hostfile", str(hosts), str(run)]) == REFUSED
    said = capfd.readouterr()
    assert "hosts: no-such-host.invalid does not answer: ssh: Could not resolve hostname" in said.err
    assert "rule: ssh without a password, and this folder" in said.err
    assert "GLOO_SOCKET_IFNAME" not in said.out  # the user has set it


@pytest.mark.slow
def test_hosts_that_differ_are_refused(
    tmp_path: Path, scenes: SceneShards, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second host has another version of a file, and another folder for output."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("cosmos_scale", "kernels", "configs"):
        shutil.copytree(REPOSITORY / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "cosmos_scale" / "words.py").open("a").write("# newer\n")
    if (REPOSITORY / ".venv").is_dir():  # with the Python that runs these tests
        (copy / ".venv").symlink_to(REPOSITORY / ".venv")
    run = write_run(tmp_path, scenes, output="~/runs")
    other = f"SSH_ORIGINAL_COMMAND=$(printf %s \"$SSH_ORIGINAL_COMMAND\" | sed 's#{REPOSITORY}#{copy}#g')"
    with two_hosts(tmp_path / "hosts-of-test", other) as programs:
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        assert main(["launch", "--check", "--hostfile", str(write_hostfile(tmp_path, 1, 1)), str(run)]) == REFUSED
    table = " ".join(capfd.readouterr().out.split())
    assert "sources REFUSED " in table
    assert "rule: the same files of cosmos_scale on each host" in table
    assert "output REFUSED worker-a, worker-b does not see the other hosts' files in " in table
    assert "config REFUSED worker-b and worker-a differ in output; rule: one run's keys" in table


@pytest.mark.slow
@pytest.mark.usefixtures("on_path")
def test_a_run_is_trained_over_ssh(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes)
    launch(tmp_path, "--hostfile", str(write_hostfile(tmp_path, 1, 1)), str(run)).require(FINISHED)
    assert [record["step"] for record in records(run)] == list(range(1, 9))


@pytest.mark.usefixtures("on_path")
def test_a_host_that_falls_silent_is_lost_and_ends_its_own_ranks(tmp_path: Path) -> None:
    """The connection is there, and nothing comes: a stopped ssh, in the place of a host without power."""
    words = ["1!:wait", "0!:wait"]
    hosts = [HOSTS[0], [["worker-a", 1]]]
    with launched(tmp_path / "run", *words, hosts=hosts, link_limit=8.0, restarts=1) as running:
        pids = [running.pid_of(rank) for rank in range(2)]
        clients = [pid for pid in children_of(running.process.pid) if b"worker-b" in command_of(pid)]
        os.kill(clients[0], signal.SIGSTOP)
        ended = running.end().require(FINISHED)
    assert "host worker-b is lost (no answer for 8 s)" in ended.errors
    assert "1 of 2 ranks go on" in ended.errors
    assert not any(map(lives, pids))


@pytest.mark.usefixtures("on_path")
def test_a_launch_that_was_stopped_says_why_its_ranks_have_stopped(tmp_path: Path) -> None:
    with launched(tmp_path / "run", "*:wait", hosts=HOSTS, link_limit=6.0) as running:
        pids = [running.pid_of(rank) for rank in range(2)]
        running.signal(signal.SIGSTOP)
        running.wait_for("saved-0", "saved-1")
        running.wait_until(lambda: not any(map(lives, pids)), "the ranks' end")
        running.signal(signal.SIGCONT)
        ended = running.end().require(STOPPED)
    why = (
        "nothing came from the launch for 6 s: it was stopped, or the network was cut; its ranks stop after their step"
    )
    assert ended.errors.count(why) == 1  # not per host
    for file in ("worker-a-0.log", "worker-b-1.log"):
        assert (tmp_path / "run" / "logs" / file).read_text().count(f", the agent of this host: {why}") == 1


def test_a_login_script_that_reads_standard_input_gets_no_message(tmp_path: Path) -> None:
    with two_hosts(tmp_path / "hosts-of-test", "timeout 1 cat > /dev/null") as programs:
        path = f"{programs}:{os.environ['PATH']}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", path)
            with launched(tmp_path / "run", "*:say~here", "*:wait", hosts=HOSTS) as running:
                for rank in range(2):
                    running.pid_of(rank)
                running.signal(signal.SIGUSR1)
                running.end().require(STOPPED)
    assert (tmp_path / "run" / "logs" / "worker-b-1.log").read_text().splitlines()[1:] == ["here"]


def children_of(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def command_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
