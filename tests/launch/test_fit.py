"""World sizes on the hosts that are left, against all sizes tried one by one."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmos_scale.config.load import make_config
from cosmos_scale.errors import UserError
from cosmos_scale.launch.fit import (
    MICRO_BATCH_FILE,
    Fit,
    check_world_size,
    first_world_size,
    fit_ranks,
    place_ranks,
    remember_micro_batch,
    remembered_micro_batch,
)
from cosmos_scale.launch.hostfile import Host


def test_half_the_hosts_left() -> None:
    config = make_config({"train": {"global_batch": 1024}})
    assert fit_ranks(config, 24, most=32, least=1) == Fit(16, 2)
    assert fit_ranks(config, 32, most=32, least=1) == Fit(32, 1)
    hosts = [Host("a", 8), Host("b", 8), Host("c", 8)]
    assert first_world_size(config, 24) == 16  # a new launch on what is left
    assert first_world_size(make_config({"train": {"global_batch": 1024, "micro_batches": 512}}), 24) == 2
    in_two = make_config({"train": {"global_batch": 1024, "micro_batches": 2}})
    assert fit_ranks(in_two, 64, most=16, least=1) == Fit(
        64, 2
    )  # as many as the config says, where these are no larger
    assert fit_ranks(in_two, 16, most=16, least=1) == Fit(16, 4)
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
    found = fit_ranks(config, slots, most=samples, least=1)
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
        fit_ranks(config, 24, most=32, least=20)


def test_a_micro_batch_is_remembered_as_long_as_its_keys_stay(tmp_path: Path) -> None:
    config = make_config({"train": {"global_batch": 1024, "micro_batches": 2}})
    assert remembered_micro_batch(config, tmp_path) is None
    remember_micro_batch(config, 16, tmp_path)
    assert remembered_micro_batch(config, tmp_path) == 16
    for keys in ({"global_batch": 1024, "micro_batches": 1}, {"global_batch": 2048, "micro_batches": 2}):
        assert remembered_micro_batch(make_config({"train": keys}), tmp_path) is None
    for damaged in ("", "[]", "{}", '{"samples": "16"}', '{"samples": 0}'):
        (tmp_path / MICRO_BATCH_FILE).write_text(damaged)
        assert remembered_micro_batch(config, tmp_path) is None
    remember_micro_batch(config, 16, tmp_path / "nowhere")  # of a disk that is gone: the launch goes on
