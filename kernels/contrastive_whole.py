"""InfoNCE of many pairs of views where one process holds all rows: the loss and its gradients at once.

On a CPU a pair's gradient is formed in the memory of the pair's logits, so that each pair costs two matrix products
(three with column gradients). The loss is that of `contrastive.py`, whose blocks serve all other sizes and devices.
"""

import torch
from torch import Tensor

from cosmos_scale.kernels.contrastive import (
    BLOCK_ELEMENTS,
    Gradients,
    arithmetic_dtype,
    backward,
    by_log_scale,
    forward_partials,
    share_of_loss,
    sizes_of,
)
from cosmos_scale.kernels.serving import like_gpu

# `whole_batch` takes pairs of this many logits or more one by one. With fewer, launching operations takes most of the
# time, so that many pairs at once are faster.
PAIR_ELEMENTS = 2**14
# How many elements of a pair are multiplied by their factors at a time: the most that torch computes in one CPU thread.
# With several threads each small operation waits for all of them, which takes longer where the cores are shared.
FACTOR_ELEMENTS = 2**15


def whole_batch(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    weights: Tensor,
    *,
    column_gradients: bool,
    triton: bool = True,
    block_elements: int = BLOCK_ELEMENTS,
    pair_elements: int = PAIR_ELEMENTS,
) -> tuple[Tensor, Gradients]:
    """Return the loss, [] float64, and its gradients where this process holds all rows.

    rows: [V, B, E]; columns: [T, B, E]; scale, weights, column_gradients, triton: as for `backward`. On a CPU pairs of
    pair_elements to block_elements logits are computed one by one. All others are computed by `forward_partials` and
    `backward`: on a GPU launching the small kernels of one pair after the other would take most of the time.
    Raises ValueError on shapes that do not fit.
    """
    _, B, _, G = sizes_of(rows, columns, scale)
    if B != G:
        raise ValueError(f"rows {list(rows.shape)} must be all rows: as many as columns {list(columns.shape)}")
    if not like_gpu(rows.device) and pair_elements <= B**2 <= block_elements:
        return _pair_by_pair(rows, columns, scale, weights, column_gradients)
    partials = forward_partials(rows, columns, scale, first_row=0, triton=triton, block_elements=block_elements)
    gradients = backward(
        rows,
        columns,
        scale,
        weights,
        partials.row_lse,
        partials.column_lse,
        first_row=0,
        column_gradients=column_gradients,
        triton=triton,
        block_elements=block_elements,
    )
    return share_of_loss(*partials, weights, B), gradients


def _pair_by_pair(
    rows: Tensor, columns: Tensor, scale: Tensor, weights: Tensor, column_gradients: bool
) -> tuple[Tensor, Gradients]:
    """Do what `whole_batch` does, pair by pair: a pair's gradient takes the place of the pair's logits in memory."""
    (V, B, _), T = rows.shape, columns.shape[0]
    columns_TBE = columns.to(arithmetic_dtype(rows, columns))
    weights_VT = (weights * (0.5 / B)).to(columns_TBE.dtype)
    row_lse, column_lse_VTG, positive = (columns_TBE.new_empty(V, T, B) for _ in range(3))
    by_rows = columns_TBE.new_zeros(rows.shape)
    by_columns = torch.zeros_like(columns_TBE) if column_gradients else None
    # Two buffers for all pairs: on a CPU, fresh memory costs as much time as the exponentials.
    block = columns_TBE.new_empty(B, B)
    factors = columns_TBE.new_empty(max(1, FACTOR_ELEMENTS // B), B)
    for v in range(V):
        rows_BE = rows[v].to(columns_TBE.dtype)
        for t in range(T):
            torch.mm(rows_BE, columns_TBE[t].T, out=block)
            positive[v, t] = block.diagonal() * scale
            row_lse[v, t], column_lse_VTG[v, t] = _cosines_to_slope(block, scale, weights_VT[v, t], factors)
            by_rows[v].addmm_(block, columns_TBE[t])
            if by_columns is not None:
                by_columns[t].addmm_(block.T, rows_BE)
    del block, factors  # freed before the last lines, which need memory for a view's products
    by_rows *= scale
    if by_columns is not None:
        by_columns *= scale
    loss = share_of_loss(row_lse, positive, column_lse_VTG, weights, B)
    return loss, Gradients(by_rows, by_columns, by_log_scale(rows, by_rows))


def _cosines_to_slope(block: Tensor, scale: Tensor, weight: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a pair's logits / scale [B, B] into weight * (softmax of rows + softmax of columns - 2 at the positives).

    block: [B, B], changed in place. weight: []. factors: scratch [any, B]. Returns the logsumexp of rows [B] and of
    columns [B].

    Each logit is exponentiated once, after half its row's and half its column's maximum is subtracted. If the row's
    maximum alone were subtracted, a whole column could become 0 where logits lie 200 apart. With normalised features
    |logit| <= scale. Then no exponent is above 0.4 * scale, and the exponents at a row's or a column's maximum are at
    least -0.6 * scale. The exponents of the two factors lie in scale * [-0.7, 0.3]. Float32 holds exp(-87) to exp(88).
    So at scale 100, the largest, a term that is exp(-27) of its sum still counts.
    """
    margin = 0.2 * scale
    row_shift, column_shift = (block.amax(dim=dim) * (0.5 * scale) - margin for dim in (1, 0))
    row_factor, column_factor = row_shift.exp(), column_shift.exp()
    block.mul_(scale).sub_(row_shift.unsqueeze(1)).sub_(column_shift).exp_()
    row_sum, column_sum = block @ column_factor, row_factor @ block
    over_row_sum, over_column_sum = weight / row_sum, weight / column_sum
    for start in range(0, len(block), len(factors)):
        part = slice(start, start + len(factors))
        scratch = factors[: len(block) - start]
        torch.mul(over_row_sum[part].unsqueeze(1), column_factor, out=scratch)
        block[part].mul_(scratch.addcmul_(row_factor[part].unsqueeze(1), over_column_sum))
    block.diagonal().sub_(2 * weight)
    return row_shift + row_sum.log(), column_shift + column_sum.log()
