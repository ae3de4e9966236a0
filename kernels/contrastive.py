"""InfoNCE of many pairs of views at once, without a batch x batch matrix: torch reference.

A rank holds B rows of each of V row views, and all G columns of each of T column views. A pair (v, t) has the logits
scale * rows[v] @ columns[t].T; row i's positive is column `first_row + i`. The loss is

    sum over pairs of weights[v, t] * mean over samples of (row cross-entropy + column cross-entropy) / 2.

Three calls: `forward_partials` reduces this rank's logits to one number a row and two a column; the caller combines
the columns' numbers of all ranks (`column_lse`); then `finish` gives the loss and `backward` the gradients, computing
the logits again. Logits live one block at a time (Gao et al., "Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup", section 3, is the same idea on one rank).

All arithmetic runs in float32 (float64 for float64 features): low-precision features are widened before the matmul,
which is their exact product with float32 accumulation.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Logits alive at a time: 16 MiB in float32, small beside activations and large enough to keep a GPU's matmul busy.
BLOCK_ELEMENTS = 2**22


class Partials(NamedTuple):
    """What this rank's rows say about the loss; float32 (float64 for float64 features).

    row_lse: [V, T, B] logsumexp of each row, complete because a row sees all columns.
    positive: [V, T, B] logit of each row's own sample.
    column_max, column_sum: [V, T, G] over this rank's rows alone: the largest logit, and sum(exp(logit - largest)).
    """

    row_lse: Tensor
    positive: Tensor
    column_max: Tensor
    column_sum: Tensor


class Gradients(NamedTuple):
    """Derivatives of the loss; float32 (float64 for float64 features).

    rows: [V, B, E] complete. columns: [T, G, E] from this rank's rows alone, or None where not asked for.
    log_scale: [] float64, from this rank's rows alone, by the logarithm of the scale.
    """

    rows: Tensor
    columns: Tensor | None
    log_scale: Tensor


def forward_partials(
    rows: Tensor, columns: Tensor, scale: Tensor, *, first_row: int, block_elements: int = BLOCK_ELEMENTS
) -> Partials:
    """Reduce this rank's logits to row and column statistics.

    rows: [V, B, E]; columns: [T, G, E]; any floating dtype. scale: [] factor of the logits, not its logarithm.
    first_row: column of the positive of row 0. block_elements: most logits alive at a time (at least one row's).
    Raises ValueError on shapes that do not fit.
    """
    V, B, T, G = _check(rows, columns, scale, first_row)
    dtype = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
    columns_NE = columns.reshape(T * G, -1).to(dtype)
    row_lse = columns_NE.new_empty(V, T, B)
    positive = columns_NE.new_empty(V, T, B)
    column_max = columns_NE.new_full((V, T, G), -torch.inf)
    column_sum = columns_NE.new_zeros(V, T, G)
    for views, samples in _blocks(V, B, T * G, block_elements):
        logits = _logits(rows[views, samples].to(dtype) * scale, columns_NE, T)
        row_lse[views, :, samples] = logits.logsumexp(dim=3).transpose(1, 2)
        positive[views, :, samples] = _positives(logits, first_row + samples.start)
        largest = torch.maximum(column_max[views], logits.amax(dim=1))
        rescaled = column_sum[views] * (column_max[views] - largest).exp_()
        column_sum[views] = rescaled.add_(logits.sub_(largest.unsqueeze(1)).exp_().sum(dim=1))
        column_max[views] = largest
    return Partials(row_lse, positive, column_max, column_sum)


def column_lse(column_max: Tensor, column_sum: Tensor) -> Tensor:
    """Logsumexp of each column.

    column_max, column_sum: [V, T, G] over all rows of all ranks, or over one rank's for its share.
    """
    return column_max + column_sum.log()


def finish(partials: Partials, column_lse_VTG: Tensor, weights: Tensor, *, first_row: int) -> Tensor:
    """This rank's share of the loss: the shares of all ranks add up to it.

    column_lse_VTG: [V, T, G] over all ranks' rows; weights: [V, T]. Returns [] float64.
    """
    B, G = partials.row_lse.shape[2], column_lse_VTG.shape[2]
    own_columns_VTB = column_lse_VTG[:, :, first_row : first_row + B]
    # Differences first: at scale 100 the terms are near 100 and the loss may be near 0.
    terms_VTB = (partials.row_lse - partials.positive) + (own_columns_VTB - partials.positive)
    return (terms_VTB.sum(dim=2, dtype=torch.float64) * weights).sum() * (0.5 / G)


def backward(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    weights: Tensor,
    row_lse: Tensor,
    column_lse_VTG: Tensor,
    *,
    first_row: int,
    column_gradients: bool,
    block_elements: int = BLOCK_ELEMENTS,
) -> Gradients:
    """Derivatives of the loss by this rank's rows, by the scale and, if asked for, by all columns.

    rows, columns, scale, first_row, block_elements: as for `forward_partials`. weights: [V, T].
    row_lse: [V, T, B]; column_lse_VTG: [V, T, G] over all ranks' rows.
    """
    V, B, T, G = _check(rows, columns, scale, first_row)
    columns_NE = columns.reshape(T * G, -1).to(row_lse.dtype)
    weights_V1T1 = (weights * (0.5 / G)).to(row_lse.dtype).view(V, 1, T, 1)
    by_rows = rows.new_empty(rows.shape, dtype=row_lse.dtype)
    by_columns_NE = torch.zeros_like(columns_NE) if column_gradients else None
    for views, samples in _blocks(V, B, T * G, block_elements):
        scaled_rows = rows[views, samples].to(row_lse.dtype) * scale
        logits = _logits(scaled_rows, columns_NE, T)
        # dL/dlogit = weight / 2G * (softmax over the row + softmax over the column - 2 at the positive)
        slope = (logits - column_lse_VTG[views].unsqueeze(1)).exp_()
        slope += logits.sub_(row_lse[views, :, samples].transpose(1, 2).unsqueeze(3)).exp_()
        _positives(slope, first_row + samples.start).sub_(2.0)
        slope_NN = slope.mul_(weights_V1T1[views]).view(-1, T * G)
        by_rows[views, samples] = (slope_NN @ columns_NE).view_as(scaled_rows) * scale
        if by_columns_NE is not None:
            by_columns_NE.addmm_(slope_NN.T, scaled_rows.flatten(0, 1))
    # Rows enter the loss only as scale * rows, so no further pass is needed: dL/dlog(scale) = <rows, dL/drows>.
    by_log_scale = (rows.to(row_lse.dtype) * by_rows).sum(dtype=torch.float64)
    by_columns = None if by_columns_NE is None else by_columns_NE.view(T, G, -1)
    return Gradients(by_rows, by_columns, by_log_scale)


def _check(rows: Tensor, columns: Tensor, scale: Tensor, first_row: int) -> tuple[int, int, int, int]:
    """Refuse shapes that do not fit; return V, B, T, G."""
    if rows.dim() != 3 or columns.dim() != 3 or rows.shape[2] != columns.shape[2]:
        raise ValueError(f"rows {list(rows.shape)} and columns {list(columns.shape)} must be [V, B, E] and [T, G, E]")
    if scale.dim() != 0:
        raise ValueError(f"scale {list(scale.shape)} must be []")
    (V, B, _), (T, G, _) = rows.shape, columns.shape
    if not 0 <= first_row <= G - B:
        raise ValueError(f"rows {first_row} to {first_row + B} must lie within the {G} columns")
    return V, B, T, G


def _blocks(V: int, B: int, row_elements: int, block_elements: int) -> Iterator[tuple[slice, slice]]:
    """Slices of views and of samples whose logits fit a block: several whole views, or part of one."""
    block_rows = max(1, block_elements // row_elements)
    block_views = max(1, block_rows // B)
    for view in range(0, V, block_views):
        for sample in range(0, B, block_rows):
            yield slice(view, min(view + block_views, V)), slice(sample, min(sample + block_rows, B))


def _logits(scaled_rows_VBE: Tensor, columns_NE: Tensor, T: int) -> Tensor:
    """Logits [V, B, T, G] of a block."""
    V, B, _ = scaled_rows_VBE.shape
    return (scaled_rows_VBE.flatten(0, 1) @ columns_NE.T).view(V, B, T, -1)


def _positives(block_VBTG: Tensor, first_column: int) -> Tensor:
    """View [V, T, B] of a block's positives; those of its first row stand in `first_column`."""
    B = block_VBTG.shape[1]
    return block_VBTG[..., first_column : first_column + B].diagonal(dim1=1, dim2=3)
