"""The Triton kernels around products and attention, by their autograd functions, against float64: a json line a case.

A program of its own: Triton decides when it reads a kernel whether the kernel is interpreted, by TRITON_INTERPRET. With
the argument `cuda` it runs the compiled kernels on a GPU, in low precisions too.
"""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cosmos_scale.kernels import triton_sums
from cosmos_scale.kernels.pointwise import add_norm, gelu, split_stacked

EPS = 1e-5


class Case(NamedTuple):
    """rows x width; plain: without an update, and the sum unused. full_gain: gain and offset are float32 always.

    values: float32 values are read in place of gain and offset.
    """

    rows: int
    width: int
    plain: bool = False
    full_gain: bool = False
    values: bool = False


NORMS = (
    Case(1, 64),
    Case(37, 72),
    Case(11, 200, plain=True),
    Case(9, 512, full_gain=True),
    Case(23, 768),
    Case(13, 136, values=True),
    Case(5, 1280),
)
WIDES = ((1, 64), (37, 100), (9, 1536), (21, 320))  # rows and width
STACKS = ((1, 16, 2), (37, 72, 3), (19, 768, 12), (6, 320, 5))  # rows, width, heads


def relative(found: Sequence[Tensor | None], wanted: Sequence[Tensor], names: str) -> dict[str, float]:
    """Return the distance of each tensor from what is wanted, relative to its length."""
    result = {}
    for name, mine, oracle in zip(names.split(), found, wanted, strict=True):
        assert mine is not None, name
        assert mine.shape == oracle.shape, name
        result[name] = ((mine.double().cpu() - oracle).norm() / oracle.norm()).item()
    return result


class Draws:
    """Random tensors of one dtype on one device, the same at every start."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._dtype, self._device = dtype, device

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return drawn.to(self._device, dtype or self._dtype)


def exact(tensor: Tensor) -> Tensor:
    """Return a float64 leaf of the same values."""
    return tensor.detach().double().cpu().requires_grad_()


def norm_errors(case: Case, draw: Draws) -> dict[str, float]:
    """Return the errors of `add_norm` and of all its gradients."""
    rows, width = case.rows, case.width
    dtype = torch.float32 if case.full_gain else None
    x, update, d_total, d_normed = (draw(rows, width) for _ in range(4))
    gain, offset, bias = (draw(width, dtype=dtype) for _ in range(3))
    values = (draw(width, dtype=torch.float32), draw(width, dtype=torch.float32)) if case.values else None
    x64, update64, gain64, offset64 = (exact(tensor) for tensor in (x, update, *(values or (gain, offset))))
    # The sum is rounded before it is normalised, as torch's two operators would do.
    rounded = x.detach() if case.plain else x.detach() + update.detach()
    total64 = x64 if case.plain else x64 + update64
    total64 = total64 + (rounded.double().cpu() - total64).detach()
    normed64 = functional.layer_norm(total64, (width,), gain64, offset64, EPS)
    leaves = [tensor.requires_grad_() for tensor in (x, gain, offset)]
    if case.plain:
        _, normed = add_norm(x, None, None, gain, offset, EPS)
        torch.autograd.backward([normed], [d_normed])
        torch.autograd.backward([normed64], [d_normed.double().cpu()])
        found, wanted = [normed, *(leaf.grad for leaf in leaves)], [normed64, x64.grad, gain64.grad, offset64.grad]
        return relative(found, [tensor for tensor in wanted if tensor is not None], "normed x gain offset")
    leaves += [update.requires_grad_(), bias.requires_grad_()]
    total, normed = add_norm(x, update, bias, gain, offset, EPS, values)
    torch.autograd.backward([total, normed], [d_total, d_normed])
    torch.autograd.backward([total64, normed64], [d_total.double().cpu(), d_normed.double().cpu()])
    assert update64.grad is not None
    found = [total, normed, *(leaf.grad for leaf in leaves)]
    wanted = [total64, normed64, x64.grad, gain64.grad, offset64.grad, update64.grad, update64.grad.sum(0)]
    return relative(
        found, [tensor for tensor in wanted if tensor is not None], "total normed x gain offset update bias"
    )


def gelu_errors(rows: int, width: int, draw: Draws) -> dict[str, float]:
    """Return the errors of `gelu` and of both its gradients."""
    x, upstream, bias = draw(rows, width), draw(rows, width), draw(width)
    x.mul_(2)  # the tails too
    x64 = exact(x)
    functional.gelu(x64).backward(upstream.double().cpu())
    active = gelu(x.requires_grad_(), bias.requires_grad_())
    active.backward(upstream)
    assert x64.grad is not None
    return relative([active, x.grad, bias.grad], [functional.gelu(x64), x64.grad, x64.grad.sum(0)], "active x bias")


def stack_errors(rows: int, width: int, heads: int, side_by_side: bool, draw: Draws) -> dict[str, float]:
    """Return the errors of both gradients of `split_stacked`, whose three upstreams are one tensor or three."""
    stacked, bias = draw(rows, 3 * width).requires_grad_(), draw(3 * width).requires_grad_()
    parts = split_stacked(stacked, bias, heads)
    upstream = draw(rows, 3, heads, width // heads)
    gradients = [part if side_by_side else part.contiguous() for part in upstream.unbind(1)]
    for number, part in enumerate(parts):
        assert torch.equal(part, stacked.view(rows, 3, heads, -1)[:, number])
    torch.autograd.backward(parts, gradients)
    wanted = upstream.flatten(1).double().cpu()
    return relative([stacked.grad, bias.grad], [wanted, wanted.sum(0)], "stacked bias")


def checks() -> dict[str, Callable[[Draws], dict[str, float]]]:
    """Return every case by its name."""
    named: dict[str, Callable[[Draws], dict[str, float]]] = {}
    for norm in NORMS:
        named[f"{norm}"] = partial(norm_errors, norm)
    for rows, width in WIDES:
        named[f"gelu {rows} x {width}"] = partial(gelu_errors, rows, width)
    for rows, width, heads in STACKS:
        for together in (False, True):
            name = f"stack {rows} x {width}{', side by side' if together else ''}"
            named[name] = partial(stack_errors, rows, width, heads, together)
    return named


def main() -> int:
    """Run all cases twice; the second time must give the same bits."""
    device = "cuda" if "cuda" in sys.argv[1:] else "cpu"
    low = (torch.bfloat16, torch.float16) if device == "cuda" else (torch.float16,)
    if device == "cpu":
        triton_sums.PROGRAMS = 6  # each then takes several tiles of the few rows that an interpreter can do
    for dtype in (torch.float32, *low):
        for name, check in checks().items():
            errors, again = (check(Draws(dtype, device)) for _ in range(2))
            assert errors == again, name
            print(json.dumps({"case": name, "dtype": str(dtype), "errors": errors}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
