"""The two hosts, started once for all tests of this folder; skips them, with the reason, where they cannot be."""

from collections.abc import Iterator

import pytest

from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.testing.hosts import hosts_missing, namespace_hosts
from tests.multinode.two_hosts import TwoHosts


@pytest.fixture(scope="session")
def _two_hosts(tmp_path_factory: pytest.TempPathFactory, scenes: SceneShards) -> Iterator[TwoHosts]:
    missing = hosts_missing("pdsh")
    if missing is not None:
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("multinode")
    with namespace_hosts(folder / "hosts-of-test", ("worker-a", "worker-b")) as (a, b):
        yield TwoHosts(folder, a, b, scenes)


@pytest.fixture
def hosts(_two_hosts: TwoHosts) -> Iterator[TwoHosts]:
    """Both hosts, plugged in and without a program of ours before and after the test."""
    yield _two_hosts
    for host in (_two_hosts.a, _two_hosts.b):
        host.plug()
        host.end_programs()
