"""The bytes that a rank holds of student, optimizer and teacher, by formula; benchmarks/memory.py measures the same.

Bytes per parameter, with b = 4 in fp32 and 2 in bf16 and fp16; W marks what is cut into one share a rank:

| stage       | weights | gradients | masters          | moments | average | teacher          |
|-------------|---------|-----------|------------------|---------|---------|------------------|
| 0           | b       | b         | 4 (fp32: 0)      | 8       | 4       | b (fp32: 0)      |
| 1, 2        | b       | b / W     | 4 / W (fp32: 0)  | 8 / W   | 4 / W   | b                |
| 3           | b / W   | b / W     | 4 / W            | 8 / W   | 4 / W   | b / W            |
| 1, 2 + host | b       | 4 / W     | 4 / W            | 8 / W   | 4 / W   | b                |
| 3 + host    | b / W   | (b + 4)/W | 4 / W            | 8 / W   | 4 / W   | b / W            |

The fp32 masters are the weights themselves where DeepSpeed keeps both whole or flat, and the fp32 teacher is the
average itself where a rank holds all of it (stage 0, and one process up to stage 2). With `zero.offload` masters,
moments, average and the masters' gradients lie on the host. This is between backward and update: during the backward
stage 1 holds whole gradients and stage 2 a bucket of them.
"""

import math
from typing import Literal, NamedTuple

from cosmos_scale.config import RunConfig
from cosmos_scale.engine.deepspeed_config import PERSISTENT_WEIGHTS, gradient_bucket
from cosmos_scale.engine.optimizer import build_optimizer
from cosmos_scale.model.cosmos import CosmosModel

Part = Literal["weights", "gradients", "masters", "moments", "average", "teacher", "buffers", "padding"]
FLAT_ALIGNMENT = 2  # stages 1 and 2 pad each group of the optimizer to a multiple of this many elements a rank


class Row(NamedTuple):
    """Some of what a rank holds. on_host: not on the device."""

    part: Part
    what: str
    nbytes: int
    on_host: bool = False


def state_memory(model: CosmosModel, config: RunConfig, world_size: int) -> list[Row]:
    """Return what the rank that holds most holds between backward and update; activations come on top.

    model: on any device, the meta device too; not yet taken over by DeepSpeed.
    """
    groups = [
        [parameter.numel() for parameter in group["params"]]
        for group in build_optimizer(model.named_parameters(), config.optimizer, config.ema).param_groups
    ]
    elements = sum(map(sum, groups))
    if config.zero.stage == 0:
        return _unsharded(elements, config)
    if config.zero.stage == 3:
        return _sharded_weights(groups, elements, config, world_size)
    return _sharded_states(groups, elements, config, world_size)


def total(rows: list[Row], *, on_host: bool | None = None) -> int:
    """Return the bytes of rows: those on the host, those on the device, or (None) both."""
    return sum(row.nbytes for row in rows if on_host is None or row.on_host == on_host)


def _unsharded(elements: int, config: RunConfig) -> list[Row]:
    exact, low = config.precision == "fp32", _itemsize(config)
    return [
        Row("weights", "whole", low * elements),
        Row("gradients", "whole", low * elements),
        Row("masters", "the weights themselves" if exact else "whole", 0 if exact else 4 * elements),
        Row("moments", "whole", 8 * elements),
        Row("average", "whole", 4 * elements),
        Row("teacher", "the average itself" if exact else "whole", 0 if exact else low * elements),
    ]


def _sharded_states(groups: list[list[int]], elements: int, config: RunConfig, world_size: int) -> list[Row]:
    exact, low, host = config.precision == "fp32", _itemsize(config), config.zero.offload
    alignment = FLAT_ALIGNMENT * world_size
    flat = [math.ceil(sum(group) / alignment) * alignment for group in groups]
    shared_masters = exact and not host
    is_average = exact and world_size == 1 and not host
    weights_and_teacher = low if is_average else 2 * low
    shard = (4 if host else low) + (0 if shared_masters else 4) + 12
    padding = sum(flat) - elements
    rows = [
        Row("weights", "whole", low * elements),
        Row("gradients", "shard", (4 if host else low) * elements // world_size, host),
        Row(
            "masters",
            "views of the weights" if shared_masters else "shard",
            0 if shared_masters else 4 * elements // world_size,
            host,
        ),
        Row("moments", "shards", 8 * elements // world_size, host),
        Row("average", "shard", 4 * elements // world_size, host),
        Row("teacher", "the average itself" if is_average else "whole", 0 if is_average else low * elements),
        Row("padding", "of the flat groups", padding * weights_and_teacher + padding * shard // world_size),
    ]
    if host:
        largest = max(map(max, groups))
        rows += [
            Row("buffers", "shard in compute precision, on its way back", low * elements // world_size, True),
            Row("buffers", "one gradient on its way", low * largest),
            Row("buffers", "one gradient on its way", low * largest, True),
        ]
    shares = [group // world_size for group in flat]
    cut = max(
        sum(_beyond_share(group, share, rank) for group, share in zip(groups, shares, strict=True))
        for rank in range(world_size)
    )
    if host and config.train.micro_batches > 1:
        earlier = low * (elements // world_size + cut)
        rows.append(Row("buffers", "gradients of earlier micro-batches, of whole tensors", earlier, True))
    elif not host:
        rows.append(Row("gradients", "other ranks' ends of tensors that a shard's limit cuts", low * cut))
    return rows


def _sharded_weights(groups: list[list[int]], elements: int, config: RunConfig, world_size: int) -> list[Row]:
    low, host = _itemsize(config), config.zero.offload
    tensors = [elements for group in groups for elements in group]
    # One process's share is all of a tensor already.
    persistent = sum(tensor for tensor in tensors if tensor < PERSISTENT_WEIGHTS) if world_size > 1 else 0
    padding = sum(math.ceil(tensor / world_size) for tensor in tensors) - elements // world_size
    rows = [
        Row("weights", "shard", low * elements // world_size),
        Row("weights", f"tensors of under {PERSISTENT_WEIGHTS:,} elements, whole", low * persistent),
        Row("gradients", "shard", low * elements // world_size),
        Row("masters", "shard", 4 * elements // world_size, host),
        Row("moments", "shards", 8 * elements // world_size, host),
        Row("average", "shard", 4 * elements // world_size, host),
        Row("teacher", "shard", low * elements // world_size),
        Row("buffers", "gradient bucket, fp32", 4 * gradient_bucket(elements)),
        Row("padding", "of tensors", padding * (3 * low + 16)),
    ]
    if host:
        rows.append(Row("gradients", "masters'", 4 * elements // world_size, True))
    return rows


def _beyond_share(tensors: list[int], share: int, rank: int) -> int:
    """Elements of the tensors that lie partly in a rank's share of a flat group, outside of it."""
    begin, end, place, beyond = rank * share, (rank + 1) * share, 0, 0
    for tensor in tensors:
        inside = min(place + tensor, end) - max(place, begin)
        if inside > 0:
            beyond += tensor - inside
        place += tensor
    return beyond


def _itemsize(config: RunConfig) -> int:
    return 4 if config.precision == "fp32" else 2
