"""AdamW, the average and the low-precision copies of many shards in one Triton kernel, and gradient norms in another.

One launch takes a list of shards (`shard_table.py`): one flat shard, or hundreds of parameters. What all elements of an
update share (bias corrections, clipping, the skip flag) is computed once, by a kernel of one program: the host waits
for nothing, and no number that changes from step to step compiles anew. `adamw_ema.py` calls these operators on a GPU;
there the update is explained.

An element costs 32 bytes (weight, moments and average, read and written), its gradient, and its copies. Results are the
same at every call: no atomic addition, each program writes numbers of its own.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos_scale.kernels.shard_table import (
    POINTED,
    are_aligned,
    find_shard,
    find_tensor,
    programs,
    table_of,
)


class BlockSizes(NamedTuple):
    """Elements of a program of the update; of the norm: elements of a turn, turns of a program; warps of both.

    With four elements a thread, a thread's accesses to float32 have 16 bytes. With eight, registers double on a B200.
    """

    update: int = 1024
    norm: int = 2048
    turns: int = 8
    warps: int = 8


BLOCKS = BlockSizes()


# Numbers of an update, in order.
KEEP, GRADIENT_FACTOR, LR, STEP_SIZE, ROOT_CORRECTION, SHARE = (tl.constexpr(place) for place in range(6))
NUMBERS = 6


@triton.jit
def numbers_kernel(
    numbers,  # [NUMBERS] float32, written
    updates,  # [] float32, those done before
    skip,  # [] float32
    gradient_factor,  # [] float32, or None
    lr,
    share,  # of the weights in the average
    LOG_BETA1: tl.constexpr,  # natural logarithms
    LOG_BETA2: tl.constexpr,
):
    """Compute what all elements of an update share. 1 - beta ** t needs float64: at first it is a small difference."""
    step = tl.load(updates).to(tl.float64) + 1.0
    one = tl.full([], 1.0, tl.float64)
    correction1 = one - tl.exp(step * tl.full([], LOG_BETA1, tl.float64))
    correction2 = one - tl.exp(step * tl.full([], LOG_BETA2, tl.float64))
    tl.store(numbers + KEEP, 1.0 - tl.load(skip))
    tl.store(numbers + GRADIENT_FACTOR, 1.0 if gradient_factor is None else tl.load(gradient_factor))
    tl.store(numbers + LR, lr)
    tl.store(numbers + STEP_SIZE, (lr / correction1).to(tl.float32))
    tl.store(numbers + ROOT_CORRECTION, tl.sqrt(correction2).to(tl.float32))
    tl.store(numbers + SHARE, share)


@triton.jit
def update_block(
    table,
    shard,
    start,
    elements,
    numbers,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    weight_decay,
    low,
    high,
    SHARDS: tl.constexpr,
    GRADIENT: tl.constexpr,
    COPY: tl.constexpr,
    HAS_WEIGHT_COPIES: tl.constexpr,
    HAS_AVERAGE_COPIES: tl.constexpr,
    AVERAGE_FIRST: tl.constexpr,
    CLAMPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Update BLOCK elements of a shard from `start` on; WHOLE: whether the shard has so many."""
    place = start + tl.arange(0, BLOCK)
    exists = None if WHOLE else place < elements
    weights = find_tensor(table, 0, shard, SHARDS, tl.float32, ALIGNED) + place
    gradients = find_tensor(table, 1, shard, SHARDS, GRADIENT, ALIGNED) + place
    first_moments = find_tensor(table, 2, shard, SHARDS, tl.float32, ALIGNED) + place
    second_moments = find_tensor(table, 3, shard, SHARDS, tl.float32, ALIGNED) + place
    averages = find_tensor(table, 4, shard, SHARDS, tl.float32, ALIGNED) + place
    gradient = tl.load(gradients, mask=exists).to(tl.float32) * tl.load(numbers + GRADIENT_FACTOR)
    before = tl.load(weights, mask=exists)
    first = tl.load(first_moments, mask=exists)
    second = tl.load(second_moments, mask=exists)
    average = tl.load(averages, mask=exists)

    weight = before * (1.0 - tl.load(numbers + LR) * weight_decay)
    first += rest1 * (gradient - first)
    second = beta2 * second + rest2 * gradient * gradient
    denominator = tl.div_rn(tl.sqrt_rn(second), tl.load(numbers + ROOT_CORRECTION)) + eps
    weight -= tl.load(numbers + STEP_SIZE) * tl.div_rn(first, denominator)
    share = tl.load(numbers + SHARE)
    averaged = before if AVERAGE_FIRST else weight
    # From the nearer end, so that a share of 1 gives the weight itself.
    difference = averaged - average
    average = tl.where(share < 0.5, average + share * difference, averaged - (1.0 - share) * difference)
    if CLAMPS:
        weight = tl.minimum(tl.maximum(weight, low), high)

    tl.store(weights, weight, mask=exists)
    tl.store(first_moments, first, mask=exists)
    tl.store(second_moments, second, mask=exists)
    tl.store(averages, average, mask=exists)
    if HAS_WEIGHT_COPIES:
        copies = find_tensor(table, 5, shard, SHARDS, COPY, ALIGNED) + place
        tl.store(copies, weight.to(COPY), mask=exists)
    if HAS_AVERAGE_COPIES:
        copies = find_tensor(table, 6, shard, SHARDS, COPY, ALIGNED) + place
        tl.store(copies, average.to(COPY), mask=exists)


@triton.jit
def update_kernel(
    table,  # [ADDRESSES + 8, SHARDS] int64
    numbers,  # [NUMBERS] float32
    beta1,
    rest1,  # 1 - beta1
    beta2,
    rest2,
    eps,
    weight_decay,
    low,  # the weights' range
    high,
    SHARDS: tl.constexpr,
    GRADIENT: tl.constexpr,  # dtype
    COPY: tl.constexpr,  # dtype
    HAS_WEIGHT_COPIES: tl.constexpr,
    HAS_AVERAGE_COPIES: tl.constexpr,
    AVERAGE_FIRST: tl.constexpr,
    CLAMPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update a block of a shard, or leave it as it is where the update is skipped."""
    if tl.load(numbers + KEEP) != 0.0:
        shard, start, elements = find_shard(table, SHARDS, BLOCK)
        if start == 0:
            step = find_tensor(table, 7, shard, SHARDS, tl.float32, False)
            tl.store(step, tl.load(step) + 1.0)
        # Two forms of one code: with a mask, each thread takes its elements one by one.
        if start + BLOCK <= elements:
            update_block(
                *(table, shard, start, elements, numbers, beta1, rest1, beta2, rest2, eps, weight_decay, low, high),
                *(SHARDS, GRADIENT, COPY, HAS_WEIGHT_COPIES, HAS_AVERAGE_COPIES, AVERAGE_FIRST, CLAMPS, ALIGNED, BLOCK),
                True,
            )
        else:
            update_block(
                *(table, shard, start, elements, numbers, beta1, rest1, beta2, rest2, eps, weight_decay, low, high),
                *(SHARDS, GRADIENT, COPY, HAS_WEIGHT_COPIES, HAS_AVERAGE_COPIES, AVERAGE_FIRST, CLAMPS, ALIGNED, BLOCK),
                False,
            )


@triton.jit
def squares_kernel(
    table,  # [ADDRESSES + 1, SHARDS] int64
    partials,  # [programs] float32, written
    SHARDS: tl.constexpr,
    GRADIENT: tl.constexpr,  # dtype
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Sum the squares of TURNS blocks of a tensor."""
    shard, start, elements = find_shard(table, SHARDS, BLOCK * TURNS)
    gradients = find_tensor(table, 0, shard, SHARDS, GRADIENT, ALIGNED)
    total = tl.zeros([BLOCK], tl.float32)
    if start + BLOCK * TURNS <= elements:
        for turn in range(TURNS):
            gradient = tl.load(gradients + start + turn * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
            total += gradient * gradient
    else:
        for turn in range(TURNS):
            place = start + turn * BLOCK + tl.arange(0, BLOCK)
            gradient = tl.load(gradients + place, mask=place < elements, other=0.0).to(tl.float32)
            total += gradient * gradient
    tl.store(partials + tl.program_id(0), tl.sum(total, 0))


@torch.library.custom_op("cosmos_scale::adamw_ema_numbers", mutates_args=())
def update_numbers(
    updates: Tensor, skip: Tensor, gradient_factor: Tensor | None, lr: float, beta1: float, beta2: float, share: float
) -> Tensor:
    """Return what all elements of an update share: [NUMBERS] float32.

    updates, skip, gradient_factor: [] float32: updates done before; 0 or 1; the factor of the gradients. share: of the
    weights in the average.
    """
    numbers = updates.new_empty(NUMBERS)
    constants = numbers_constants(beta1, beta2)
    numbers_kernel[(1,)](numbers, updates, skip, gradient_factor, lr, share, **constants, num_warps=1)
    return numbers


@update_numbers.register_fake
def _(
    updates: Tensor, skip: Tensor, gradient_factor: Tensor | None, lr: float, beta1: float, beta2: float, share: float
) -> Tensor:
    return updates.new_empty(NUMBERS)


WRITTEN = ("weights", "first_moments", "second_moments", "averages", "weight_copies", "average_copies", "steps")


@torch.library.custom_op("cosmos_scale::adamw_ema_update", mutates_args=WRITTEN)
def update(
    weights: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    averages: list[Tensor],
    weight_copies: list[Tensor],
    average_copies: list[Tensor],
    steps: list[Tensor],
    numbers: Tensor,
    betas: list[float],
    eps: float,
    weight_decay: float,
    clamp: list[float],
    average_first: bool,
) -> None:
    """Update shards in place by one launch, and write the weights and averages in low precision too.

    All lists but betas and clamp hold a tensor a shard, contiguous, of equal sizes; lists of copies may be empty. A
    step is [], and is raised by one. Gradients have one floating dtype, copies one, all others float32. numbers: of
    `update_numbers`. clamp: the weights' least and greatest values, or nothing.
    """
    lists = (weights, gradients, first_moments, second_moments, averages, weight_copies, average_copies)
    copies = [*weight_copies, *average_copies]
    low, high = clamp or (0.0, 0.0)
    update_kernel[(programs([weight.numel() for weight in weights], BLOCKS.update),)](
        table_of(lists, BLOCKS.update, steps),
        numbers,
        *(betas[0], 1.0 - betas[0], betas[1], 1.0 - betas[1], eps, weight_decay, low, high),
        **update_constants(
            len(weights),
            gradients[0].dtype,
            copies[0].dtype if copies else torch.float32,
            weight_copies=bool(weight_copies),
            average_copies=bool(average_copies),
            average_first=average_first,
            clamps=bool(clamp),
            aligned=are_aligned(lists),
        ),
        num_warps=BLOCKS.warps,
    )


update.register_fake(lambda *_: None)


@torch.library.custom_op("cosmos_scale::gradient_squares", mutates_args=())
def gradient_squares(gradients: list[Tensor]) -> Tensor:
    """Return sums of the squares of parts of the gradients, by one launch: [programs] float32.

    gradients: contiguous, of one floating dtype.
    """
    partials = _empty_partials(gradients)
    squares_kernel[(partials.numel(),)](
        table_of((gradients,), BLOCKS.norm * BLOCKS.turns),
        partials,
        **squares_constants(len(gradients), gradients[0].dtype, aligned=are_aligned((gradients,))),
        num_warps=BLOCKS.warps,
    )
    return partials


@gradient_squares.register_fake
def _(gradients: list[Tensor]) -> Tensor:
    return _empty_partials(gradients)


def numbers_constants(beta1: float, beta2: float) -> dict[str, object]:
    """Return the compile-time constants of `numbers_kernel`."""
    logarithms = (math.log(beta) if beta > 0.0 else -math.inf for beta in (beta1, beta2))
    return dict(zip(("LOG_BETA1", "LOG_BETA2"), logarithms, strict=True))


def update_constants(
    shards: int,
    gradient: torch.dtype,
    copy: torch.dtype,
    *,
    weight_copies: bool,
    average_copies: bool,
    average_first: bool,
    clamps: bool,
    aligned: bool,
) -> dict[str, object]:
    """Return the compile-time constants of `update_kernel`."""
    return {
        "SHARDS": triton.next_power_of_2(shards),
        "GRADIENT": POINTED[gradient],
        "COPY": POINTED[copy],
        "HAS_WEIGHT_COPIES": weight_copies,
        "HAS_AVERAGE_COPIES": average_copies,
        "AVERAGE_FIRST": average_first,
        "CLAMPS": clamps,
        "ALIGNED": aligned,
        "BLOCK": BLOCKS.update,
    }


def squares_constants(shards: int, gradient: torch.dtype, *, aligned: bool) -> dict[str, object]:
    """Return the compile-time constants of `squares_kernel`."""
    return {
        "SHARDS": triton.next_power_of_2(shards),
        "GRADIENT": POINTED[gradient],
        "ALIGNED": aligned,
        "BLOCK": BLOCKS.norm,
        "TURNS": BLOCKS.turns,
    }


def _empty_partials(gradients: list[Tensor]) -> Tensor:
    count = programs([gradient.numel() for gradient in gradients], BLOCKS.norm * BLOCKS.turns)
    return gradients[0].new_empty(count, dtype=torch.float32)
