"""The Triton kernels of the contrastive loss in Triton's interpreter against float64: prints a json line for each case.

A program of its own: Triton decides when it reads a kernel whether the kernel is interpreted, by TRITON_INTERPRET.
"""

import json
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cosmos_scale.kernels import contrastive, triton_contrastive


class Case(NamedTuple):
    """Sizes as in `contrastive.forward_partials`."""

    name: str
    V: int
    B: int
    T: int
    G: int
    E: int
    first_row: int
    scale: float = 20.0
    dtype: torch.dtype = torch.float32
    positive_rows: tuple[int, int] | None = None
    samples: int | None = None

    @property
    def positives(self) -> contrastive._Positives:
        """Where the positives lie."""
        return contrastive._Positives(self.first_row, *(self.positive_rows or (0, self.B)))


CASES = (
    Case("one block of everything", 2, 5, 3, 5, 16, 0),
    Case("several blocks, odd sizes", 3, 20, 2, 70, 40, 33),
    Case("the last rows of the columns", 1, 33, 2, 40, 16, 7),
    Case("part of the columns", 2, 40, 2, 18, 24, -13, positive_rows=(15, 31), samples=90),
    Case("the largest scale", 2, 17, 2, 34, 24, 17, 100.0),
    Case("float16", 2, 18, 2, 36, 48, 18, 20.0, torch.float16),
    # Slopes of equal logits are 4e-8 here: float16 holds none of them as they are.
    Case("float16, many samples", 1, 3, 1, 3000, 16, 1500, 1.0, torch.float16),
)


def exact(rows: Tensor, columns: Tensor, scale: Tensor, weights: Tensor, case: Case) -> dict[str, Tensor]:
    """Return the loss's parts and derivatives in float64 by autograd, from all logits at once."""
    rows, columns = rows.double().requires_grad_(), columns.double().requires_grad_()
    logits = torch.einsum("vbe,tge->vtbg", rows * scale.double(), columns)
    own = torch.arange(case.positives.start, case.positives.stop)
    positive = logits[:, :, own, own + case.first_row]
    # Rows of other ranks: the same for all columns, so that a column's logsumexp is not of this rank's rows alone.
    column_lse = torch.logaddexp(logits.logsumexp(2), torch.tensor(1.5, dtype=torch.float64))
    row_lse = logits.logsumexp(3)
    # Each row and each column of the pair is a term; terms of other ranks' columns reach this rank's rows too.
    terms = row_lse.sum(2) + column_lse.sum(2) - 2 * positive.sum(2)
    loss = (terms * weights).sum() * (0.5 / (case.samples or case.G))
    loss.backward()
    assert rows.grad is not None
    assert columns.grad is not None
    return {
        "row_lse": row_lse.detach(),
        "positive": positive.detach(),
        "own_column_lse": logits.detach().logsumexp(2),
        "column_lse": column_lse.detach(),
        "rows": rows.grad,
        "columns": columns.grad,
        "log_scale": (rows.grad * rows.detach()).sum(),
    }


def errors(case: Case) -> dict[str, float]:
    """Return the largest error of each statistic, and the relative one of each gradient."""
    generator = torch.Generator().manual_seed(0)
    rows = normalize(torch.randn(case.V, case.B, case.E, generator=generator), dim=-1).to(case.dtype)
    columns = normalize(torch.randn(case.T, case.G, case.E, generator=generator), dim=-1).to(case.dtype)
    weights = torch.rand(case.V, case.T, generator=generator, dtype=torch.float64)
    scale = torch.tensor(case.scale)
    wanted = exact(rows, columns, scale, weights, case)
    partials = contrastive._fused_partials(rows, columns, scale, case.positives)
    gradients = contrastive._fused_backward(
        *(rows, columns, scale, weights, partials.row_lse, wanted["column_lse"].float()),
        positives=case.positives,
        samples=case.samples or case.G,
        column_gradients=True,
    )
    assert gradients.columns is not None
    found = {"row_lse": partials.row_lse, "positive": partials.positive, "own_column_lse": partials.column_lse}
    by = {"rows": gradients.rows, "columns": gradients.columns, "log_scale": gradients.log_scale}
    result = {name: (tensor - wanted[name]).abs().max().item() for name, tensor in found.items()}
    return result | {name: ((of - wanted[name]).norm() / wanted[name].norm()).item() for name, of in by.items()}


def main() -> int:
    """Run all cases with small blocks, since the interpreter is slow."""
    triton_contrastive.TILES = triton_contrastive.TileSizes(16, 16, 16, 32)
    triton_contrastive.STRETCH = 32
    for case in CASES:
        print(json.dumps({"case": case.name, "dtype": str(case.dtype), "errors": errors(case)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
