"""AdamW and the exponential moving average of the weights as one in-place update of fp32 shards."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def adamw_ema_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    averages: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    momentum: float,
    average_first: bool,
    skip: Tensor,
) -> None:
    """Update weights by AdamW (decoupled decay) and averages by a <- momentum a + (1 - momentum) w, all in place.

    weights, gradients, first_moments, second_moments, averages: lists of equal length; the tensors of one index share
    their shape, float32, one device. steps: [] float32 each: the updates done so far, raised by one here.
    average_first: the average takes the weights before (True) or after (False) the AdamW update.
    skip: [] float32 on the same device: 0 updates; 1 leaves everything as it was, whatever the gradients hold. The
    host never reads skip. The weights must be finite: with skip 1 the averages still take 0 times a difference to them.
    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2.
    """
    if average_first:
        average_(averages, weights, momentum, skip)
    adamw(
        list(weights),
        list(gradients),
        list(first_moments),
        list(second_moments),
        [],
        list(steps),
        fused=True,
        found_inf=skip,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    if not average_first:
        average_(averages, weights, momentum, skip)


def average_(averages: Sequence[Tensor], weights: Sequence[Tensor], momentum: float, skip: Tensor) -> None:
    """Move averages towards weights in place: a <- a + (1 - momentum) (1 - skip) (w - a).

    averages, weights: lists of equal length, equal shapes, float32. skip: [] float32, 0 or 1.
    """
    share = (1.0 - momentum) * (1.0 - skip)
    torch._foreach_lerp_(list(averages), list(weights), [share] * len(averages))


def clamp_(tensors: Sequence[Tensor], low: float, high: float) -> None:
    """Clamp tensors in place to [low, high]."""
    torch._foreach_clamp_min_(list(tensors), low)
    torch._foreach_clamp_max_(list(tensors), high)
