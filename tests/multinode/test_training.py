"""Training over two hosts, neither of which resolves its own name: losses, and going on after what happens to hosts."""

import os
import signal
import time

import pytest

from cosmos_scale.exit_status import FINISHED
from tests.multinode.two_hosts import ENDS_WITHIN, OTHER_WORLD_SIZE, START, STEPS, TwoHosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_link_that_is_cut_for_a_while_changes_no_loss(hosts: TwoHosts) -> None:
    """Equal to a run on one host, bit for bit: each rank has one thread, and a sum of two numbers has no order."""
    launch = hosts.launch("name=cut", "zero.stage=1", "train.watchdog_seconds=24")
    hosts.wait_for_step(launch, "cut", 5)
    hosts.b.cut()
    hosts.wait_until(launch, lambda: "no progress for" in launch.errors, "a word on the standstill")
    hosts.b.plug()
    status = launch.wait(START)
    assert status == FINISHED, launch.output + launch.errors
    assert "rank 1 on host worker-b does not answer" in launch.errors
    assert hosts.losses("cut") == list(hosts.reference(1).items())
    hosts.require_none_left()


def test_the_script_over_pdsh_trains_as_one_host_does(hosts: TwoHosts) -> None:
    script = hosts.script("name=script", "zero.stage=3")
    status = script.wait(START)
    assert status == 0, script.output + script.errors
    assert "looked at in" in script.output
    assert hosts.losses("script") == list(hosts.reference(3).items())
    hosts.require_none_left()


def test_a_run_goes_on_at_one_host_and_at_two_after_a_rank_was_killed(hosts: TwoHosts) -> None:
    keys = ("name=deepspeed", "zero.stage=1", "checkpoint.every=5")
    killed = hosts.deepspeed(*keys)
    hosts.wait_for_step(killed, "deepspeed", 7)
    rank = hosts.b.rank_pid(1)
    assert rank is not None
    os.kill(rank, signal.SIGKILL)
    status = killed.wait(ENDS_WITHIN)
    assert status != 0
    assert killed.errors.count("rank 1 on host worker-b has ended") == 1, killed.errors
    hosts.require_none_left()
    alone = hosts.deepspeed(*keys, "train.max_steps=20", hosts=hosts.only_a)
    assert alone.wait(START) == 0, alone.output + alone.errors
    both = hosts.deepspeed(*keys, "train.max_steps=30")
    assert both.wait(START) == 0, both.output + both.errors
    require_reference(hosts, "deepspeed", 30)
    hosts.require_none_left()


def test_a_launch_outlives_a_dead_rank_and_a_lost_host(hosts: TwoHosts) -> None:
    launch = hosts.launch("--back-off", "1", "--link-limit", "5", "name=lost", "zero.stage=1", "checkpoint.every=5")
    hosts.wait_for_step(launch, "lost", 7)
    rank = hosts.b.rank_pid(1)
    assert rank is not None
    os.kill(rank, signal.SIGKILL)
    hosts.wait_until(launch, lambda: "restart 1 of 3" in launch.errors, "the end of all ranks", ENDS_WITHIN)
    assert launch.errors.count("rank 1 on host worker-b") == 1, launch.errors
    assert "rank 1 on host worker-b was ended by SIGKILL" in launch.errors
    hosts.wait_for_step(launch, "lost", 15)
    hosts.b.lose_power()
    try:
        status = launch.wait(2 * START)
    finally:
        hosts.b.boot()
    assert status == FINISHED, launch.output + launch.errors
    assert "host worker-b is lost (no answer for 5 s)" in launch.errors
    assert "1 of 2 ranks go on, the global batch stays 8 (2 micro-batches a rank)" in launch.errors
    require_reference(hosts, "lost", STEPS)
    hosts.require_none_left()


def require_reference(hosts: TwoHosts, name: str, last: int) -> None:
    """Each loss is that of the undisturbed run at the same step, and no step is left out."""
    losses, reference = hosts.losses(name), hosts.reference(1)
    assert sorted({step for step, _ in losses}) == list(range(1, last + 1))
    for step, loss in losses:
        assert loss == pytest.approx(reference[step], rel=OTHER_WORLD_SIZE), f"step {step}"


def test_a_link_that_stays_cut_ends_the_run(hosts: TwoHosts) -> None:
    """The watchdog of each host ends its rank, though deepspeed itself waits for host b."""
    killed = hosts.deepspeed("name=watched", "train.watchdog_seconds=8")
    hosts.wait_for_step(killed, "watched", 5)
    hosts.b.cut()
    began = time.monotonic()
    hosts.wait_until(killed, lambda: hosts.a.rank_pid(0) is None and hosts.b.rank_pid(1) is None, "the ranks' end")
    assert time.monotonic() - began < 8 + ENDS_WITHIN
    hosts.b.plug()
    assert killed.wait(ENDS_WITHIN) != 0
    assert "rank 1 on host worker-b does not answer; rank 0 on host worker-a: " in killed.errors
    assert "stacks: " in killed.errors
    assert hosts.files("watched", "hang-rank-*.txt") == ["hang-rank-0.txt", "hang-rank-1.txt"]
    hosts.require_none_left()


def test_a_launch_ends_where_the_link_stays_cut(hosts: TwoHosts) -> None:
    launch = hosts.launch("--restarts", "0", "name=launched", "train.watchdog_seconds=8")
    hosts.wait_for_step(launch, "launched", 5)
    hosts.b.cut()
    assert launch.wait(8 + 2 * ENDS_WITHIN) == 1
    assert "rank 1 on host worker-b does not answer; rank 0 on host worker-a: " in launch.errors
    assert "stacks: " in launch.errors
    assert hosts.files("launched", "hang-rank-*.txt") == ["hang-rank-0.txt", "hang-rank-1.txt"]
    hosts.b.plug()
    hosts.require_none_left()
