"""The world size that fits: ranks that share the global batch evenly, on the hosts that are there."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.config import RunConfig
from cosmos_scale.errors import UserError
from cosmos_scale.files import load_json, read_regular, whole_file
from cosmos_scale.launch.attempt import HostRanks
from cosmos_scale.launch.hostfile import Host

MICRO_BATCH_FILE = "micro_batch.json"  # in the run's folder


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


def fit_ranks(config: RunConfig, slots: int, most: int, least: int) -> Fit:
    """Return the largest world size on some slots that shares the global batch evenly, and how it is cut.

    Micro-batches keep the memory of a rank: they have at most `most` samples. They are as many as the config says where
    that does it, else as few as possible. Raises UserError where fewer ranks than `least` would be left.
    """
    batch, parts = config.train.global_batch, config.train.micro_batches
    world_size = max(size for size in range(1, slots + 1) if batch % size == 0)
    if world_size < least:
        raise UserError(
            f"--min-ranks: {least}, but {world_size} of the {slots} ranks that are left can share train.global_batch "
            f"{batch}; {_sizes_near(config, least)}"
        )
    share = batch // world_size
    cuts = (cut for cut in (parts, *range(1, share + 1)) if share % cut == 0 and share // cut <= most)
    return Fit(world_size, next(cuts))


def remember_micro_batch(config: RunConfig, samples: int, folder: Path) -> None:
    """Leave in a run's folder how many samples a micro-batch has under these keys; a failure changes nothing."""
    with suppress(OSError), whole_file(folder / MICRO_BATCH_FILE) as part:
        part.write_text(json.dumps(_keys(config) | {"samples": samples}) + "\n")


def remembered_micro_batch(config: RunConfig, folder: Path) -> int | None:
    """Return how many samples a micro-batch had in an earlier launch with the same keys, None where that is unknown."""
    with suppress(OSError, ValueError):
        found = load_json(read_regular(folder / MICRO_BATCH_FILE))
        if isinstance(found, dict) and isinstance(samples := found.pop("samples", None), int):
            return samples if found == _keys(config) and samples > 0 else None
    return None


def _keys(config: RunConfig) -> dict[str, int]:
    return {
        "train.global_batch": config.train.global_batch,
        "train.micro_batches": config.train.micro_batches,
    }


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
