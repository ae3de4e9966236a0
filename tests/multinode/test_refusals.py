"""What the two hosts are refused for, within seconds: a host out of reach, other keys, another index."""

from pathlib import Path

import pytest
import yaml

from cosmos_scale.data.scenes.scene_shards import build_scenes
from cosmos_scale.exit_status import REFUSED
from tests.multinode.two_hosts import START, TwoHosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_host_out_of_reach_is_refused(hosts: TwoHosts) -> None:
    hosts.b.cut()
    launch = hosts.launch("name=unreached")
    assert launch.wait(START) == REFUSED
    assert "hosts: worker-b does not answer: ssh: connect to host 10.77.0.2 port 22: " in launch.errors
    assert "rule: ssh without a password, and this folder" in launch.errors
    hosts.require_none_left()


def test_hosts_with_other_keys_and_another_index_are_refused(hosts: TwoHosts, tmp_path: Path) -> None:
    """By the look before a launch, and by the ranks themselves under deepspeed."""
    own_run = tmp_path / "run.yaml"
    tree = yaml.safe_load(hosts.run.read_text())
    own_run.write_text(yaml.safe_dump(tree | {"log": {"every": 2}}))
    own_shards = build_scenes(tmp_path / "scenes", train=60, gallery=24, workers=1)
    with hosts.b.own_file(hosts.run, own_run):
        trained = hosts.deepspeed("name=refused")
        with hosts.b.own_file(hosts.scenes.train, own_shards.train):
            look = hosts.launch("--check", "name=refused")
            assert look.wait(START) == REFUSED, look.errors
        assert trained.wait(START) != 0
    table = " ".join(look.output.split())
    assert "config REFUSED worker-b and worker-a differ in log.every; rule: one run's keys" in table
    assert "index REFUSED worker-b has " in table
    assert "rank 1 and rank 0 differ in log.every; rule: all ranks share one run's keys" in trained.errors
    hosts.require_none_left()


def test_what_one_host_alone_is_refused_for_ends_deepspeed_on_all(hosts: TwoHosts, tmp_path: Path) -> None:
    """Before the ranks have met: the other hosts would wait for half an hour."""
    for host, rank in ((hosts.b, 1), (hosts.a, 0)):
        broken = tmp_path / f"broken-{rank}.yaml"
        broken.write_text("name: [\n")
        with host.own_file(hosts.run, broken):
            trained = hosts.deepspeed("name=broken")
            assert trained.wait(START) == REFUSED, trained.errors
        other = "worker-a" if rank else "worker-b"
        said = f"{other}: cosmos-scale train: rank {rank} on host {host.name}: {hosts.run}: line 2 is not valid YAML"
        assert said in trained.errors
        hosts.require_none_left()
