"""InfoNCE of many pairs of views at once, without keeping a batch x batch matrix: torch reference.

A rank holds B rows of each of V row views, and all G columns of each of T column views. A pair (v, t) has the logits
scale * rows[v] @ columns[t].T; row i's positive is column `first_row + i`. The loss is

    sum over pairs of weights[v, t] * mean over samples of (row cross-entropy + column cross-entropy) / 2.

There are three steps. `forward_partials` reduces this rank's logits of each pair to two numbers a row and one number a
column. The caller combines the columns' numbers of all ranks. Then `share_of_loss` gives the loss and `backward` the
gradients; `backward` computes the logits again. On one rank this is the idea of Gao et al., "Scaling Deep Contrastive
Learning Batch Size under Memory Limited Setup", section 3. Where one process holds all rows, `contrastive_whole.py` is
faster.

A caller may take a part of the columns at a time: the rows' logsumexps of the parts are combined by logaddexp, and the
rows' gradients are added up. Then `positive_rows` says which rows have their positives among the columns.

Scratch memory, beside statistics and results: at most SCRATCH_BLOCKS * BLOCK_ELEMENTS elements, whatever the batch.

All arithmetic runs in float32 (float64 for float64 features). Low-precision features are widened before the matmul, so
that each product of two features is exact and is added up in float32. On a GPU low-precision features are not widened:
the GPU adds up the same exact products in float32, and slopes are rounded to the features' dtype before they are
multiplied. The kernels of `triton_contrastive.py` do so without keeping logits.

A maximum is subtracted before logits are exponentiated. One maximum for a whole pair would not do: at scale 100 the
logits of a pair lie up to 200 apart, and exp(-104) is 0 in float32, so a whole row or column could become 0. So every
row and every column has a maximum of its own.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cosmos_scale.kernels.serving import like_gpu, serves

# Elements of a block of logits: 16 MiB in float32, small beside activations and large enough for a GPU's matmul.
BLOCK_ELEMENTS = 2**22
# Blocks alive at a time: the softmax of rows and of columns, and then the next block's logits.
SCRATCH_BLOCKS = 3
LOW_DTYPES = (torch.bfloat16, torch.float16)
# Whether this torch multiplies factors of low precision into float32 (2.8 and later).
SUMS_IN_FLOAT32 = "dtype" in torch.ops.aten.mm.overloads()
# Slopes times 2 * samples are multiplied by this before they are rounded to the features' dtype: float16 ends at 6e-8,
# so with 4,096 samples they would come to nothing; and at 65,504. They lie between -2 and 2 for a weight of 1.
SLOPE_FACTOR = 2**13
# Elements of features that are widened at a time for the scale's derivative: 1 MiB in float32.
WIDENED_ELEMENTS = 2**18


class Partials(NamedTuple):
    """What this rank's rows say about the loss; float32 (float64 for float64 features).

    row_lse: [V, T, B] logsumexp of each row over these columns.
    positive: [V, T, P] logit of each positive row's own sample.
    column_lse: [V, T, G] logsumexp of each column over this rank's rows alone.
    """

    row_lse: Tensor
    positive: Tensor
    column_lse: Tensor


class Gradients(NamedTuple):
    """Derivatives of the loss; float32 (float64 for float64 features).

    rows: [V, B, E] from these columns. columns: [T, G, E] from this rank's rows alone, or None where the caller wants
    none.
    log_scale: [] float64, the derivative by the logarithm of the scale, from this rank's rows alone.
    """

    rows: Tensor
    columns: Tensor | None
    log_scale: Tensor


def forward_partials(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    *,
    first_row: int,
    positive_rows: slice | None = None,
    triton: bool = True,
    block_elements: int = BLOCK_ELEMENTS,
) -> Partials:
    """Reduce this rank's logits to row and column statistics.

    rows: [V, B, E]; columns: [T, G, E]; any floating dtype. scale: [] factor of the logits, not its logarithm.
    first_row: the column that holds the positive of row 0, or would hold it. positive_rows: the P rows whose positives
    are among the columns; None: all. triton: whether the Triton kernels may serve.
    block_elements: the most logits that exist at a time (but one row's at least).
    Raises ValueError on shapes that do not fit.
    """
    V, B, T, G = sizes_of(rows, columns, scale)
    positives = _positives_of(first_row, positive_rows, B, G)
    if triton and _is_fused(rows, columns):
        return _fused_partials(rows, columns, scale, positives)
    dtype, factors = arithmetic_dtype(rows, columns), _factors_dtype(rows, columns)
    columns_NE = columns.reshape(T * G, -1).to(factors)
    row_lse = columns_NE.new_empty((V, T, B), dtype=dtype)
    positive = columns_NE.new_empty((V, T, positives.stop - positives.start), dtype=dtype)
    column_max = columns_NE.new_full((V, T, G), -torch.inf, dtype=dtype)
    column_sum = columns_NE.new_zeros((V, T, G), dtype=dtype)
    for views, part in _blocks(V, B, T * G, block_elements):
        logits = _logits(_row_factors(rows[views, part], scale, factors), scale, columns_NE, T)
        here = positives.within(part)
        positive[views, :, here.start - positives.start : here.stop - positives.start] = _diagonal(
            logits, here, part.start, first_row
        )
        row_lse[views, :, part] = logits.logsumexp(dim=3).transpose(1, 2)
        largest = torch.maximum(column_max[views], logits.amax(dim=1))
        rescaled = column_sum[views] * (column_max[views] - largest).exp_()
        column_sum[views] = rescaled.add_(logits.sub_(largest.unsqueeze(1)).exp_().sum(dim=1))
        column_max[views] = largest
    return Partials(row_lse, positive, column_max.add_(column_sum.log_()))


def share_of_loss(
    row_lse_VTB: Tensor, positive_VTB: Tensor, column_lse_VTB: Tensor, weights: Tensor, samples: int
) -> Tensor:
    """Return this rank's share of the loss, [] float64; the shares of all ranks add up to the loss.

    row_lse: of the rank's rows over all columns. positive: its rows' positives. column_lse: of the rank's own columns,
    over all ranks' rows. weights: [V, T]. samples: of all ranks.
    """
    # Differences first, which keeps digits: at scale 100 the terms are near 100, and the loss may be near 0.
    terms_VTB = (row_lse_VTB - positive_VTB) + (column_lse_VTB - positive_VTB)
    return (terms_VTB.sum(dim=2, dtype=torch.float64) * weights).sum() * (0.5 / samples)


def backward(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    weights: Tensor,
    row_lse: Tensor,
    column_lse_VTG: Tensor,
    *,
    first_row: int,
    positive_rows: slice | None = None,
    samples: int | None = None,
    column_gradients: bool,
    triton: bool = True,
    block_elements: int = BLOCK_ELEMENTS,
) -> Gradients:
    """Return the loss's derivatives by this rank's rows, by the log-scale and, with column_gradients, by the columns.

    rows, columns, scale, first_row, positive_rows, triton, block_elements: as for `forward_partials`. weights: [V, T].
    row_lse: [V, T, B] over all columns; column_lse_VTG: [V, T, G] over all ranks' rows. samples: of all ranks; None: G.
    """
    V, B, T, G = sizes_of(rows, columns, scale)
    positives = _positives_of(first_row, positive_rows, B, G)
    samples = samples or G
    if triton and _is_fused(rows, columns):
        return _fused_backward(
            rows,
            columns,
            scale,
            weights,
            row_lse,
            column_lse_VTG,
            positives=positives,
            samples=samples,
            column_gradients=column_gradients,
        )
    dtype, factors = row_lse.dtype, _factors_dtype(rows, columns)
    columns_NE = columns.reshape(T * G, -1).to(factors)
    is_low = factors in LOW_DTYPES
    weights_V1T1 = (weights * (SLOPE_FACTOR if is_low else 0.5 / samples)).to(dtype).view(V, 1, T, 1)
    after = scale * (0.5 / samples / SLOPE_FACTOR) if is_low else scale
    by_rows = rows.new_empty(rows.shape, dtype=dtype)
    by_columns_NE = torch.zeros_like(columns_NE, dtype=dtype) if column_gradients else None
    for views, part in _blocks(V, B, T * G, block_elements):
        row_factors = _row_factors(rows[views, part], scale, factors)
        logits = _logits(row_factors, scale, columns_NE, T)
        # dL/dlogit = weight / 2G * (softmax over the row + softmax over the column - 2 at the positive)
        slope = (logits - column_lse_VTG[views].unsqueeze(1)).exp_()
        slope += logits.sub_(row_lse[views, :, part].transpose(1, 2).unsqueeze(3)).exp_()
        _diagonal(slope, positives.within(part), part.start, first_row).sub_(2.0)
        slope_NN = slope.mul_(weights_V1T1[views]).view(-1, T * G).to(factors)
        by_rows[views, part] = _multiply(slope_NN, columns_NE).view_as(row_factors) * after
        if by_columns_NE is not None and is_low:
            by_columns_NE.add_(_multiply(slope_NN.T, row_factors.flatten(0, 1)) * after)
        elif by_columns_NE is not None:
            by_columns_NE.addmm_(slope_NN.T, row_factors.flatten(0, 1))
    by_columns = None if by_columns_NE is None else by_columns_NE.view(T, G, -1)
    return Gradients(by_rows, by_columns, by_log_scale(rows, by_rows))


def _is_fused(rows: Tensor, columns: Tensor) -> bool:
    """Tell whether the Triton kernels serve: features of one low-precision dtype, where `serving.py` says."""
    return rows.dtype == columns.dtype and serves(rows)


def _fused_partials(rows: Tensor, columns: Tensor, scale: Tensor, positives: "_Positives") -> Partials:
    from cosmos_scale.kernels import triton_contrastive  # here: triton is there on Linux with a GPU build of torch only

    row_lse, positive, column_lse = triton_contrastive.statistics(
        rows.contiguous(), columns.contiguous(), scale.float(), *positives
    )
    row_lse, column_lse = (
        parts.logsumexp(dim=2) if parts.shape[2] > 1 else parts.squeeze(2) for parts in (row_lse, column_lse)
    )
    return Partials(row_lse, positive, column_lse)


def _fused_backward(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    weights: Tensor,
    row_lse: Tensor,
    column_lse_VTG: Tensor,
    *,
    positives: "_Positives",
    samples: int,
    column_gradients: bool,
) -> Gradients:
    from cosmos_scale.kernels import triton_contrastive

    rows, columns, scale = rows.contiguous(), columns.contiguous(), scale.float()
    row_lse, column_lse_VTG = row_lse.contiguous(), column_lse_VTG.contiguous()
    by_rows = _add_parts(
        triton_contrastive.slopes(
            rows, columns, scale, weights, row_lse, column_lse_VTG, *positives, samples, transposed=False
        )
    )
    by_columns = None
    if column_gradients:
        by_columns = _add_parts(
            triton_contrastive.slopes(
                columns,
                rows,
                scale,
                weights,
                column_lse_VTG,
                row_lse,
                *positives.of_columns(),
                samples,
                transposed=True,
            )
        )
    return Gradients(by_rows, by_columns, (rows * by_rows).sum(dtype=torch.float64))


def _add_parts(parts: Tensor) -> Tensor:
    """Add tensors along the first dimension; one of them needs no pass."""
    return parts.sum(dim=0) if len(parts) > 1 else parts.squeeze(0)


def by_log_scale(rows: Tensor, by_rows: Tensor) -> Tensor:
    """Return dL/dlog(scale), [] float64.

    Rows enter the loss only as scale * rows, so this derivative is <rows, dL/drows>. A few views are taken at a time,
    so that no widened copy of all rows is held.
    """
    views = max(1, WIDENED_ELEMENTS // rows[0].numel())
    parts = zip(rows.split(views), by_rows.split(views), strict=True)
    dots_VB = [torch.linalg.vecdot(part.to(slope.dtype), slope) for part, slope in parts]
    return torch.cat(dots_VB).sum(dtype=torch.float64)


def arithmetic_dtype(rows: Tensor, columns: Tensor) -> torch.dtype:
    """The features' widest dtype, float32 at least."""
    return torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)


def _factors_dtype(rows: Tensor, columns: Tensor) -> torch.dtype:
    """The dtype in which features are multiplied: their own where a GPU adds up in float32 what has low precision."""
    low = rows.dtype == columns.dtype and rows.dtype in LOW_DTYPES and like_gpu(rows.device)
    return rows.dtype if low and SUMS_IN_FLOAT32 else arithmetic_dtype(rows, columns)


def _row_factors(rows_VBE: Tensor, scale: Tensor, factors: torch.dtype) -> Tensor:
    """Return rows as they are multiplied: times the scale, unless their dtype would round the result."""
    return rows_VBE.to(factors) if factors in LOW_DTYPES else rows_VBE.to(factors) * scale


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b; float32 for factors of low precision, which only a GPU multiplies so."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype in LOW_DTYPES else a @ b


def sizes_of(rows: Tensor, columns: Tensor, scale: Tensor) -> tuple[int, int, int, int]:
    """Return V, B, T, G; raises ValueError on shapes that do not fit."""
    if rows.dim() != 3 or columns.dim() != 3 or rows.shape[2] != columns.shape[2]:
        raise ValueError(f"rows {list(rows.shape)} and columns {list(columns.shape)} must be [V, B, E] and [T, G, E]")
    if scale.dim() != 0:
        raise ValueError(f"scale {list(scale.shape)} must be []")
    (V, B, _), (T, G, _) = rows.shape, columns.shape
    return V, B, T, G


class _Positives(NamedTuple):
    """Rows start to stop - 1 have their positives among the columns: that of row i is column i + offset."""

    offset: int
    start: int
    stop: int

    def within(self, rows: slice) -> slice:
        """Return those of some rows that have a positive."""
        start = min(max(self.start, rows.start), rows.stop)
        return slice(start, max(start, min(self.stop, rows.stop)))

    def of_columns(self) -> "_Positives":
        """Return the same as seen from the columns."""
        return _Positives(-self.offset, self.start + self.offset, self.stop + self.offset)


def _positives_of(first_row: int, rows: slice | None, B: int, G: int) -> _Positives:
    """Return where positives lie; raises ValueError where they lie outside of B rows or G columns."""
    start, stop = (0, B) if rows is None else (rows.start, rows.stop)
    if not 0 <= start <= stop <= B:
        raise ValueError(f"rows {start} to {stop} must lie within the {B} rows")
    if not 0 <= start + first_row <= stop + first_row <= G:
        raise ValueError(f"rows {start + first_row} to {stop + first_row} must lie within the {G} columns")
    return _Positives(first_row, start, stop)


def _blocks(V: int, B: int, row_elements: int, block_elements: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of views and of samples whose logits fit into a block: several whole views, or a part of one."""
    block_rows = max(1, block_elements // row_elements)
    block_views = max(1, block_rows // B)
    for view in range(0, V, block_views):
        for sample in range(0, B, block_rows):
            yield slice(view, min(view + block_views, V)), slice(sample, min(sample + block_rows, B))


def _logits(row_factors_VBE: Tensor, scale: Tensor, columns_NE: Tensor, T: int) -> Tensor:
    """Logits [V, B, T, G] of a block. The rows: from `_row_factors`."""
    products = _multiply(row_factors_VBE.flatten(0, 1), columns_NE.T)
    if row_factors_VBE.dtype in LOW_DTYPES:
        products.mul_(scale)
    return products.view(*row_factors_VBE.shape[:2], T, -1)


def _diagonal(block_VBTG: Tensor, rows: slice, block_start: int, first_row: int) -> Tensor:
    """Return a view [V, T, rows] of the positives of some rows of a block that begins at row `block_start`."""
    of_rows = block_VBTG[:, rows.start - block_start : rows.stop - block_start]
    return of_rows[..., rows.start + first_row : rows.stop + first_row].diagonal(dim1=1, dim2=3)
