"""The bytes that a rank holds of student, optimizer and teacher, by formula; benchmarks/memory.py measures the same.

Bytes for each parameter, with b = 4 in fp32 and b = 2 in bf16 and fp16. `/ W`: each of W ranks holds one share.

| stage       | weights | gradients | masters          | moments | average | teacher          |
|-------------|---------|-----------|------------------|---------|---------|------------------|
| 0           | b       | b         | 4 (fp32: 0)      | 8       | 4       | b (fp32: 0)      |
| 1, 2        | b       | 4 / W     | 4 / W (fp32: 0)  | 8 / W   | 4 / W   | b                |
| 3           | b / W   | b / W     | 4 / W            | 8 / W   | 4 / W   | b / W            |
| 1, 2 + host | b       | 4 / W     | 4 / W            | 8 / W   | 4 / W   | b                |
| 3 + host    | b / W   | (b + 4)/W | 4 / W            | 8 / W   | 4 / W   | b / W            |

Masters take nothing in fp32 at stages 0 to 2: they are the weights themselves. The teacher takes nothing in fp32 where
a rank holds the whole average (stage 0, and one process up to stage 2): the teacher is the average itself. With
`zero.offload` the masters, the moments, the average and the masters' gradients lie on the host. The table holds between
backward and update. During the backward, stages 1 and 2 hold the gradients of a few buckets where there are several
ranks: see `gradients_in_flight`. But stage 1 holds whole float32 gradients where micro-batches add up.
"""

import math
from typing import Literal, NamedTuple

from cosmos_scale.config import RunConfig
from cosmos_scale.engine.deepspeed_config import gradient_bucket
from cosmos_scale.engine.gradients import MOST_IN_FLIGHT
from cosmos_scale.engine.optimizer import build_optimizer
from cosmos_scale.engine.zero import (
    PERSISTENT_WEIGHTS,
    OffloadedStates,
    ShardedStates,
    ShardedWeights,
    Unsharded,
    layout_of,
)
from cosmos_scale.model.cosmos import CosmosModel

Part = Literal["weights", "gradients", "masters", "moments", "average", "teacher", "buffers", "padding"]
FLAT_ALIGNMENT = 2  # stages 1 and 2 pad each group of the optimizer to a multiple of this many elements a rank


class MemoryRow(NamedTuple):
    """Some of what a rank holds: so many bytes for each of so many elements. on_host: not on the device."""

    part: Part
    what: str
    element_bytes: int
    elements: int
    on_host: bool = False

    @property
    def nbytes(self) -> int:
        """All bytes of the row."""
        return self.element_bytes * self.elements


class _Sizes(NamedTuple):
    """What the formulas are made of: elements of each tensor by optimizer group, of all, and of a rank's share."""

    groups: list[list[int]]
    elements: int
    share: int
    world_size: int
    low: int  # bytes of an element in compute precision
    exact: bool  # whether the compute precision is fp32


def state_memory(model: CosmosModel, config: RunConfig, world_size: int) -> list[MemoryRow]:
    """Return the rows of the rank that holds most, between backward and update; activations come on top.

    model: on any device, the meta device too; not yet taken over by DeepSpeed.
    """
    layout = layout_of(config)
    optimizer = build_optimizer(model.named_parameters(), config.optimizer, config.ema)
    groups = [
        [parameter.numel() for parameter in group["params"]]
        for group in layout.optimizer_groups(optimizer.param_groups, model, world_size)
    ]
    elements, exact = sum(map(sum, groups)), config.precision == "fp32"
    sizes = _Sizes(groups, elements, elements // world_size, world_size, 4 if exact else 2, exact)
    formulas = {Unsharded: _unsharded, ShardedWeights: _sharded_weights}
    formulas |= {ShardedStates: _sharded_states, OffloadedStates: _sharded_states}
    rows = formulas[layout](sizes, config)
    if layout.sharded and world_size > 1 and not exact:
        # Those of student and teacher, and in which order the values lie in what ranks gather; see full_values.py.
        values = 2 * sum(weight.numel() for norm in model.norms().values() for weight in norm.parameters())
        rows.append(MemoryRow("buffers", "norms' gains and offsets in fp32", 4 + 4, values))
        gathered = world_size * fullest_share_of_values(model, config, world_size)
        rows.append(MemoryRow("buffers", "what ranks gather of them", 4, gathered))
    return rows


def between_steps(rows: list[MemoryRow], config: RunConfig) -> list[MemoryRow]:
    """Return those rows of `state_memory` that a rank holds from an update to the next backward too.

    Each backward makes its gradients anew, and the update gives them back. At stage 3 and with `zero.offload` DeepSpeed
    keeps their memory.
    """
    keeps_gradients = layout_of(config) in (ShardedWeights, OffloadedStates)
    return [row for row in rows if keeps_gradients or row.part != "gradients"]


def fullest_share_of_values(model: CosmosModel, config: RunConfig, world_size: int) -> int:
    """Return how many of the float32 values of full_values.py the rank holds that holds most; each rank gives as many.

    model: as for `state_memory`. At stages 1 to 3.
    """
    copies = {id(scale): 1 for scale in (model.logit_scale, model.distill_logit_scale)}
    if config.precision != "fp32":  # masters and averages
        copies |= {id(weight): 2 for norm in model.norms().values() for weight in norm.parameters()}
    layout = layout_of(config)
    optimizer = build_optimizer(model.named_parameters(), config.optimizer, config.ema)
    held = [0] * world_size
    for group in layout.optimizer_groups(optimizer.param_groups, model, world_size):
        sizes = [weight.numel() for weight in group["params"]]
        share, place = _flat_size(sizes, world_size) // world_size, 0
        for weight, size in zip(group["params"], sizes, strict=True):
            part = math.ceil(size / world_size) if layout is ShardedWeights else share
            start = 0 if layout is ShardedWeights else place
            for rank in range(start // part, math.ceil((start + size) / part)) if id(weight) in copies else ():
                inside = min(start + size, (rank + 1) * part) - max(start, rank * part)
                held[rank] += copies[id(weight)] * inside
            place += size
    return max(held)


def gradients_in_flight(model: CosmosModel, config: RunConfig, world_size: int) -> int:
    """Return how many bytes of gradients a rank holds at most in the backward, beside the rows of `state_memory`.

    model: as for `state_memory`. At stages 0 to 2, on the device. Where a process is alone nothing is in flight. At
    stage 3 DeepSpeed decides how many weights it holds gathered, and there is no formula.
    """
    layout = layout_of(config)
    if world_size == 1 or layout in (ShardedWeights, OffloadedStates):
        return 0
    optimizer = build_optimizer(model.named_parameters(), config.optimizer, config.ema)
    groups = layout.optimizer_groups(optimizer.param_groups, model, world_size)
    traffic = 2 if config.zero.gradient_dtype == "bf16" else 4
    low = 4 if config.precision == "fp32" else 2
    if layout is Unsharded:
        # DeepSpeed fills a bucket until it is over its limit, copies it flat, and once more in the traffic's dtype.
        tensors: list[int] = [weight.numel() for group in groups for weight in group["params"]]
        bucket = min(sum(tensors), max(gradient_bucket(sum(tensors)), *tensors))
        return bucket * (low + (traffic if traffic != low else 0))
    # Some buckets travel while one is copied from its gradients; these shards are there already.
    buckets: list[int] = sorted((sum(weight.numel() for weight in group["params"]) for group in groups), reverse=True)
    return traffic * sum(buckets[: MOST_IN_FLIGHT + 1]) + low * buckets[0]


def total_bytes(rows: list[MemoryRow], *, on_host: bool | None = None) -> int:
    """Return the bytes of rows: those on the host, those on the device, or (None) both."""
    return sum(row.nbytes for row in rows if on_host is None or row.on_host == on_host)


def _unsharded(sizes: _Sizes, config: RunConfig) -> list[MemoryRow]:
    elements, low, exact = sizes.elements, sizes.low, sizes.exact
    return [
        MemoryRow("weights", "whole", low, elements),
        MemoryRow("gradients", "whole", low, elements),
        MemoryRow("masters", "the weights themselves" if exact else "whole", 0 if exact else 4, elements),
        MemoryRow("moments", "whole", 8, elements),
        MemoryRow("average", "whole", 4, elements),
        MemoryRow("teacher", "the average itself" if exact else "whole", 0 if exact else low, elements),
    ]


def _sharded_states(sizes: _Sizes, config: RunConfig) -> list[MemoryRow]:
    low, host, W = sizes.low, config.zero.offload, sizes.world_size
    are_weights = sizes.exact and not host  # whether the masters are the weights
    is_average = are_weights and W == 1  # whether the teacher is the average
    teacher = 0 if is_average else low
    rows = [
        MemoryRow("weights", "whole", low, sizes.elements),
        MemoryRow("gradients", "shard", 4, sizes.share, host),
        MemoryRow(
            "masters", "views of the weights" if are_weights else "shard", 0 if are_weights else 4, sizes.share, host
        ),
        MemoryRow("moments", "shards", 8, sizes.share, host),
        MemoryRow("average", "shard", 4, sizes.share, host),
        MemoryRow("teacher", "the average itself" if is_average else "whole", teacher, sizes.elements),
    ]
    # Each group is padded, so that its shares are equal. Weights and teacher hold all padding, a shard holds its part.
    flats = [_flat_size(group, W) for group in sizes.groups]
    padding, masters = sum(flats) - sizes.elements, 0 if are_weights else 4
    rows.append(MemoryRow("padding", "of whole flat groups", low + teacher, padding))
    rows.append(MemoryRow("padding", "of shards", 4 + masters + 8 + 4, padding // W))
    if not host:
        return rows
    largest = max(map(max, sizes.groups))
    rows += [
        MemoryRow("buffers", "shard in compute precision, on its way back", low, sizes.share, True),
        MemoryRow("buffers", "one gradient on its way", low, largest),
        MemoryRow("buffers", "one gradient on its way", low, largest, True),
    ]
    if config.train.micro_batches > 1:
        beyond = max(
            sum(_beyond_share(group, flat // W, rank) for group, flat in zip(sizes.groups, flats, strict=True))
            for rank in range(W)
        )
        whole = sizes.share + beyond
        rows.append(MemoryRow("buffers", "gradients of earlier micro-batches, of whole tensors", low, whole, True))
    return rows


def _sharded_weights(sizes: _Sizes, config: RunConfig) -> list[MemoryRow]:
    low, host, W = sizes.low, config.zero.offload, sizes.world_size
    tensors = [elements for group in sizes.groups for elements in group]
    # With one process a rank's share is the whole tensor already.
    # These are padded too: a rank's share of a tensor is as large as the others'.
    persistent = sum(math.ceil(tensor / W) * W for tensor in tensors if tensor < PERSISTENT_WEIGHTS) if W > 1 else 0
    padding = sum(math.ceil(tensor / W) for tensor in tensors) - sizes.share
    rows = [
        MemoryRow("weights", "shard", low, sizes.share),
        MemoryRow("weights", f"tensors of under {PERSISTENT_WEIGHTS:,} elements, whole", low, persistent),
        MemoryRow("gradients", "shard", low, sizes.share),
        MemoryRow("masters", "shard", 4, sizes.share, host),
        MemoryRow("moments", "shards", 8, sizes.share, host),
        MemoryRow("average", "shard", 4, sizes.share, host),
        MemoryRow("teacher", "shard", low, sizes.share),
        MemoryRow("buffers", "gradient bucket, fp32", 4, gradient_bucket(sizes.elements)),
        # Weights, gradients and teacher in compute precision; masters, moments and average in fp32.
        MemoryRow("padding", "of tensors", 3 * low + 4 + 8 + 4, padding),
    ]
    if host:
        rows.append(MemoryRow("gradients", "masters'", 4, sizes.share, True))
    return rows


def _flat_size(group: list[int], world_size: int) -> int:
    """Return the elements of a flat group of the optimizer at stages 1 and 2, with its padding."""
    alignment = FLAT_ALIGNMENT * world_size
    return math.ceil(sum(group) / alignment) * alignment


def _beyond_share(tensors: list[int], share: int, rank: int) -> int:
    """A share's limit cuts some tensors. Count the elements of these tensors that belong to other ranks.

    tensors: the sizes of the tensors of a flat group. share: elements of the group that each rank has.
    """
    begin, end, place, beyond = rank * share, (rank + 1) * share, 0, 0
    for tensor in tensors:
        inside = min(place + tensor, end) - max(place, begin)
        if inside > 0:
            beyond += tensor - inside
        place += tensor
    return beyond
