"""World sizes on the hosts that are left, against all sizes tried one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmos_scale.config.load import make_config
from cosmos_scale.errors import UserError
from cosmos_scale.launch.fit import Fit, check_world_size, first_world_size, fit_ranks, place_ranks
from cosmos_scale.launch.hostfile import Host


def test_half_the_hosts_left() -> None:
    config = make_config({"train": {"global_batch": 1024}})
    assert fit_ranks(config, 24, started=32, least=1) == Fit(16, 2)
    assert fit_ranks(config, 32, started=32, least=1) == Fit(32, 1)
    hosts = [Host("a", 8), Host("b", 8), Host("c", 8)]
    assert first_world_size(config, 24) == 16  # a new launch on what is left
    assert first_world_size(make_config({"train": {"global_batch": 1024, "micro_batches": 512}}), 24) == 2
    places, idle = place_ranks(hosts, 16, {"a": {"GLOO_SOCKET_IFNAME": "eth0"}})
    assert [(place.host.name, place.ranks) for place in places] == [("a", range(8)), ("b", range(8, 16))]
    assert places[0].environment == {"GLOO_SOCKET_IFNAME": "eth0"}
    assert idle == ["8 of the 8 slots of c"]


@given(
    st.integers(1, 12).flatmap(
        lambda started: st.tuples(st.just(started), st.integers(1, 4), st.integers(1, 5), st.integers(1, started))
    )
)
def test_the_largest_size_that_divides_with_no_more_memory(case: tuple[int, int, int, int]) -> None:
    started, micro_batches, samples, slots = case
    batch = started * micro_batches * samples  # samples: of a micro-batch at first
    config = make_config({"train": {"global_batch": batch, "micro_batches": micro_batches}})
    found = fit_ranks(config, slots, started=started, least=1)
    assert found.world_size == max(size for size in range(1, slots + 1) if batch % size == 0)
    share = batch // found.world_size
    assert share % found.micro_batches == 0
    assert share // found.micro_batches <= samples
    make_config({"train": {"global_batch": batch, "micro_batches": found.micro_batches}}).samples_per_rank(
        found.world_size
    )


def test_sizes_that_would_do_are_named() -> None:
    config = make_config({"train": {"global_batch": 1024, "micro_batches": 2}})
    check_world_size(config, 16)
    with pytest.raises(UserError, match="multiple of the 24 ranks; ranks that would do: 8, 16, 32, 64"):
        check_world_size(config, 24)
    with pytest.raises(UserError, match=r"ranks that would do: 256, 512$"):
        check_world_size(config, 1024)
    with pytest.raises(UserError, match=r"--min-ranks: 20, but 16 of the 24 ranks .* ranks that would do: 8, 16, 32"):
        fit_ranks(config, 24, started=32, least=20)
