"""AdamW and the exponential moving average of the weights as one in-place update of fp32 shards.

On a GPU a Triton kernel does it in one pass over a list of shards (`triton_adamw_ema.py`); elsewhere torch's operators
do it. Both take the same steps in the same order, so results agree to some units in the last place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from cosmos_scale.kernels.serving import has_triton, like_gpu

# Kinds of devices that the Triton kernels serve; also those whose tensors stand for a GPU's, see serving.py.
FUSED_DEVICES = frozenset({"cuda"})
NORM_PIECE = 2**14  # elements


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
    gradient_factor: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
    weight_copies: Sequence[Tensor] = (),
    average_copies: Sequence[Tensor] = (),
    triton: bool = True,
) -> None:
    """Update weights by AdamW (decoupled decay) and averages by a <- momentum a + (1 - momentum) w, all in place.

    weights, gradients, first_moments, second_moments, averages: lists of equal length; the tensors of one index share
    their shape, float32, one device. Gradients may have another floating dtype. steps: [] float32 each: the updates
    done so far, equal numbers, raised by one here.
    average_first: the average takes the weights before (True) or after (False) the AdamW update.
    skip: [] float32 on the same device: 0 updates; 1 leaves everything as it was, whatever the gradients hold. The
    host never reads skip. The weights must be finite: with skip 1 the averages still take 0 times a difference to them.
    gradient_factor: [] float32, which the gradients are multiplied by. clamp: least and greatest value of the weights
    after the update, not of those that the average takes. weight_copies, average_copies: take the results in a dtype of
    their own; where they are given, a tensor for each of weights. triton: whether the Triton kernel may serve.
    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2.
    """
    if is_fused(weights, triton):
        from cosmos_scale.kernels import triton_adamw_ema  # here: triton is there with a GPU build of torch only

        numbers = triton_adamw_ema.update_numbers(
            steps[0], skip, gradient_factor, lr, betas[0], betas[1], 1.0 - momentum
        )
        triton_adamw_ema.update(
            *(list(weights), _of_one_dtype(gradients), list(first_moments), list(second_moments), list(averages)),
            *(list(weight_copies), list(average_copies), list(steps), numbers, list(betas), eps, weight_decay),
            *(list(clamp or ()), average_first),
        )
        return
    if average_first:
        average_(averages, weights, momentum, skip)
    exact = [gradient.float() for gradient in gradients]
    if gradient_factor is not None:
        exact = list(torch._foreach_mul(exact, [gradient_factor] * len(exact)))
    adamw(
        list(weights),
        exact,
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
    if clamp is not None:
        # The averages stay in range by themselves: they are convex mixtures of clamped values.
        clamp_(weights, *clamp)
    for copies, results in ((weight_copies, weights), (average_copies, averages)):
        if copies:
            torch._foreach_copy_(list(copies), list(results))


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


def squared_norm(gradients: Sequence[Tensor], *, triton: bool = True) -> Tensor:
    """Return the sum of the squares of all elements of the gradients: [] float32, the same at every call.

    gradients: floating tensors on one device. triton: whether the Triton kernel may serve.
    """
    if is_fused(gradients, triton):
        from cosmos_scale.kernels import triton_adamw_ema

        partials = [
            triton_adamw_ema.gradient_squares([gradient.contiguous() for gradient in gradients if gradient.dtype == of])
            for of in sorted({gradient.dtype for gradient in gradients}, key=str)
        ]
        return torch.cat(partials).sum() if len(partials) > 1 else partials[0].sum()
    pieces = list(gradients)
    if not like_gpu(pieces[0].device):
        # There the squares of a tensor are added up one after another in float32: digits are lost in large tensors.
        pieces = [piece for gradient in gradients for piece in gradient.reshape(-1).split(NORM_PIECE)]
    norms = torch._foreach_norm(pieces, 2, dtype=torch.float32)
    return torch.stack(norms).square().sum()


def is_fused(tensors: Sequence[Tensor], triton: bool) -> bool:
    """Tell whether the Triton kernels serve such tensors."""
    device = tensors[0].device
    return triton and (device.type in FUSED_DEVICES or like_gpu(device)) and has_triton()


def _of_one_dtype(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return contiguous gradients, in float32 where their dtypes differ."""
    mixed = len({gradient.dtype for gradient in gradients}) > 1
    return [gradient.float().contiguous() if mixed else gradient.contiguous() for gradient in gradients]
