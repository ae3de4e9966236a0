"""Stops of a launch over two hosts: by signals, by the end of the launcher, and by the end of an agent's parent."""

import os
import signal
from pathlib import Path

import pytest

from cosmos_scale.exit_status import FINISHED, STOPPED
from cosmos_scale.testing.hosts import HostProgram
from tests.multinode.two_hosts import ENDS_WITHIN, START, TwoHosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_each_stop_saves_and_leaves_no_process(hosts: TwoHosts) -> None:
    """One run, stopped in four ways: its losses are those of the undisturbed run, bit for bit."""

    def launched() -> HostProgram:
        launch = hosts.launch("--back-off", "1", "name=stopped", "zero.stage=1")
        hosts.wait_for_steps(launch, "stopped", 3)
        return launch

    for number in (signal.SIGTERM, signal.SIGINT):
        launch = launched()
        launch.signal(number, whole_group=number == signal.SIGINT)
        assert launch.wait(START) == STOPPED, launch.output + launch.errors
        assert f"{number.name}: the ranks stop after their step and save a checkpoint" in launch.errors
        require_saved(hosts, "stopped")

    launch = launched()
    launch.signal(signal.SIGKILL)
    assert launch.wait(ENDS_WITHIN) == -signal.SIGKILL
    require_saved(hosts, "stopped")

    launch = launched()
    rank = hosts.b.rank_pid(1)
    assert rank is not None
    session = parent_of(parent_of(rank))
    assert b"sshd" in Path(f"/proc/{session}/cmdline").read_bytes()
    os.kill(session, signal.SIGKILL)
    assert launch.wait(START) == FINISHED, launch.output + launch.errors
    assert "host worker-b is lost (" in launch.errors
    assert hosts.losses("stopped") == list(hosts.reference(1).items())
    hosts.require_none_left()


def test_deepspeed_is_stopped_with_a_checkpoint(hosts: TwoHosts) -> None:
    """By signals to it, whose exit status is 1 all the same, and where it or its part on the other host is killed."""

    def launched() -> HostProgram:
        launch = hosts.deepspeed("name=ended", "zero.stage=1", "train.schedule_steps=100000")  # it stops slowly
        hosts.wait_for_steps(launch, "ended", 3)
        return launch

    for number in (signal.SIGTERM, signal.SIGINT):
        launch = launched()
        launch.signal(number, whole_group=number == signal.SIGINT)
        assert launch.wait(START) == 1, launch.output + launch.errors
        require_saved(hosts, "ended")

    launch = launched()
    launch.signal(signal.SIGKILL)  # pdsh and what it has started live on
    assert launch.wait(ENDS_WITHIN) == -signal.SIGKILL
    require_saved(hosts, "ended")

    launch = launched()
    rank = hosts.b.rank_pid(1)
    assert rank is not None
    os.kill(parent_of(rank), signal.SIGKILL)  # deepspeed.launcher.launch of host b
    assert launch.wait(START) != 0, launch.output + launch.errors
    require_saved(hosts, "ended")


def require_saved(hosts: TwoHosts, name: str) -> None:
    """All processes have ended, and the last step done is saved, so that none is done again."""
    hosts.require_none_left()
    assert hosts.files(f"{name}/checkpoints", "step-*")[-1] == f"step-{hosts.losses(name)[-1][0]:08d}"
