"""The world size that fits: ranks that share the global batch evenly, on the hosts that are there."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cosmos_scale.config import RunConfig
from cosmos_scale.errors import UserError
from cosmos_scale.launch.attempt import HostRanks
from cosmos_scale.launch.hostfile import Host


class Fit(NamedTuple):
    """How many ranks train, and into how many micro-batches each of them cuts its share."""

    world_size: int
    micro_batches: int


def slots_of(hosts: Sequence[Host]) -> int:
    """Return how many ranks the hosts may run together."""
    return sum(host.slots for host in hosts)


def check_world_size(config: RunConfig, world_size: int) -> None:
    """Raise UserError where the run cannot be shared by so many ranks, with the sizes next to it that can."""
    try:
        config.samples_per_rank(world_size)
    except UserError as error:
        raise UserError(f"{error}; {_sizes_near(config, world_size)}") from None


def first_world_size(config: RunConfig, slots: int) -> int:
    """Return the largest world size on some slots that shares the batch into whole micro-batches of its config.

    Raises UserError where there is none.
    """
    batch, parts = config.train.global_batch, config.train.micro_batches
    sizes = [size for size in range(1, slots + 1) if batch % size == 0 and (batch // size) % parts == 0]
    if not sizes:
        check_world_size(config, slots)
    return sizes[-1]


def fit_ranks(config: RunConfig, slots: int, started: int, least: int) -> Fit:
    """Return the largest world size on some slots that shares the global batch evenly.

    Micro-batches keep the memory of a rank: they are no larger than they were with `started` ranks.
    Raises UserError where fewer ranks than `least` would be left.
    """
    batch = config.train.global_batch
    world_size = max(size for size in range(1, slots + 1) if batch % size == 0)
    if world_size < least:
        raise UserError(
            f"--min-ranks: {least}, but {world_size} of the {slots} ranks that are left can share train.global_batch "
            f"{batch}; {_sizes_near(config, least)}"
        )
    share, most = batch // world_size, config.samples_per_rank(started) // config.train.micro_batches
    cuts = (cut for cut in range(1, share + 1) if share % cut == 0 and share // cut <= most)
    return Fit(world_size, config.train.micro_batches if world_size == started else next(cuts))


def place_ranks(
    hosts: Sequence[Host], world_size: int, interfaces: Mapping[str, Mapping[str, str]]
) -> tuple[list[HostRanks], list[str]]:
    """Return the ranks of each host, hosts filled in their order, and what stays idle, as text.

    interfaces: by host, the variables that name its network interface.
    """
    places, idle, first = [], [], 0
    for host in hosts:
        count = min(host.slots, world_size - first)
        if count:
            places.append(HostRanks(host, range(first, first + count), dict(interfaces.get(host.name, {}))))
        if count < host.slots:
            idle.append(f"{host.slots - count} of the {host.slots} slots of {host.name}")
        first += count
    return places, idle


def _sizes_near(config: RunConfig, size: int) -> str:
    """Return the next world sizes below and above that share the batch into whole micro-batches, as text."""
    batch, parts = config.train.global_batch, config.train.micro_batches
    fitting = [ranks for ranks in range(1, batch + 1) if batch % ranks == 0 and (batch // ranks) % parts == 0]
    below, above = [ranks for ranks in fitting if ranks < size][-2:], [ranks for ranks in fitting if ranks >= size][:2]
    return f"ranks that would do: {', '.join(map(str, [*below, *above]))}"
