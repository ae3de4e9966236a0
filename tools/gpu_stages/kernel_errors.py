"""The project's kernels on this device against exact results, at odd sizes, within the tolerances of the tests."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from cosmos_scale.batch import MEAN, STD
from cosmos_scale.kernels import adamw_ema, contrastive_whole, pointwise
from cosmos_scale.kernels.patches import level_values, normalised_patches
from cosmos_scale.kernels.serving import serves
from cosmos_scale.testing.tolerances import tolerance
from tools.gpu_stages.recorder import Recorder, failure

ROWS, WIDTH, HEADS, EPS = 4099, 768, 12, 1e-5
Form = Callable[..., Sequence[Tensor]]


def check(recorder: Recorder) -> None:
    """Write a row for each kernel: its largest error of results and gradients, and whether it is small enough."""
    checks: dict[str, tuple[Callable[[Recorder], float], str]] = {
        "addition and norm": (_norm, "pointwise, relative"),
        "gelu": (_gelu, "pointwise, relative"),
        "stack of q, k, v gradients": (_stack, "pointwise, relative"),
        "contrastive loss": (_contrastive, "contrastive gradients, relative"),
        "contrastive loss by torch": (lambda of: _contrastive(of, triton=False), "contrastive gradients, relative"),
    }
    for name, (error_of, entry) in checks.items():
        if entry.startswith("pointwise") and not serves(_drawn(recorder, 1)):
            recorder.write(kernel=name, cannot_run=f"it does not serve {recorder.dtype} on {recorder.device}")
            continue
        try:
            error, limit = error_of(recorder), tolerance(entry, recorder.dtype)
            recorder.write(kernel=name, error=error, at_most=limit, ok=error <= limit)
        except Exception as problem:
            recorder.write(kernel=name, ok=False, failed=failure(problem))
    for name, differs in (("optimizer's update", _update), ("normalised patches", _patches)):
        try:
            error, limit = differs(recorder)
            recorder.write(kernel=name, error=error, at_most=limit, ok=error <= limit)
        except Exception as problem:
            recorder.write(kernel=name, ok=False, failed=failure(problem))


def _worst(ours: Form, exact: Form, inputs: Sequence[Tensor]) -> float:
    """Return the largest error of any result or gradient, by norm, relative to that of the form in float64."""
    found = []
    upstreams: list[Tensor] = []
    for form, leaves in (
        (ours, [tensor.detach().requires_grad_() for tensor in inputs]),
        (exact, [tensor.detach().double().requires_grad_() for tensor in inputs]),
    ):
        results = form(*leaves)
        upstreams = upstreams or [torch.randn_like(result, memory_format=torch.contiguous_format) for result in results]
        given = [upstream.to(result.dtype) for upstream, result in zip(upstreams, results, strict=True)]
        found.append([*(result.detach() for result in results), *torch.autograd.grad(results, leaves, given)])
    return max(map(_relative, *found))


def _relative(mine: Tensor, oracle: Tensor) -> float:
    return float((mine.double() - oracle).norm() / oracle.norm())


def _drawn(recorder: Recorder, *shape: int) -> Tensor:
    return torch.randn(shape, device=recorder.device, dtype=recorder.dtype)


def _bias(bias: Tensor) -> Tensor:
    """Return zeros whose gradient flows to a bias that its product has added already."""
    return bias - bias.detach()


def _norm(recorder: Recorder) -> float:
    dtype = recorder.dtype

    def ours(x: Tensor, update: Tensor, bias: Tensor, gain: Tensor, offset: Tensor) -> Sequence[Tensor]:
        return pointwise.add_norm(x, update, bias, gain, offset, EPS)

    def exact(x: Tensor, update: Tensor, bias: Tensor, gain: Tensor, offset: Tensor) -> Sequence[Tensor]:
        total = x + update + _bias(bias)
        # The sum is rounded before it is normalised, as by torch's two operators.
        rounded = total + (total.to(dtype).double() - total).detach()
        return rounded, functional.layer_norm(rounded, (WIDTH,), gain, offset, EPS)

    return _worst(ours, exact, [_drawn(recorder, *shape) for shape in ((ROWS, WIDTH),) * 2 + ((WIDTH,),) * 3])


def _gelu(recorder: Recorder) -> float:
    return _worst(
        lambda x, bias: [pointwise.gelu(x, bias)],
        lambda x, bias: [functional.gelu(x + _bias(bias))],
        [_drawn(recorder, ROWS, 4 * WIDTH), _drawn(recorder, 4 * WIDTH)],
    )


def _stack(recorder: Recorder) -> float:
    return _worst(
        lambda stacked, bias: pointwise.split_stacked(stacked, bias, HEADS),
        lambda stacked, bias: (stacked + _bias(bias)).unflatten(-1, (3, HEADS, -1)).unbind(1),
        [_drawn(recorder, ROWS, 3 * WIDTH), _drawn(recorder, 3 * WIDTH)],
    )


def _contrastive(recorder: Recorder, *, triton: bool = True) -> float:
    rows, columns = (functional.normalize(_drawn(recorder, views, 333, 512), dim=-1) for views in (3, 2))
    scale, weights = torch.tensor(14.3, device=recorder.device), torch.rand(3, 2, device=recorder.device).double()
    results = []
    for of, factor in (((rows, columns), scale), ((rows.double(), columns.double()), scale.double())):
        loss, gradients = contrastive_whole.whole_batch(*of, factor, weights, column_gradients=True, triton=triton)
        assert gradients.columns is not None
        results.append((loss, gradients.rows, gradients.columns, gradients.log_scale))
    return max(map(_relative, *results))


def _update(recorder: Recorder) -> tuple[float, float]:
    """Return the largest difference between both forms, of values above 1, and what it may be."""
    found = []
    sizes = (1, 2048, 100_003)
    for triton in (True, False):
        generator = torch.Generator().manual_seed(0)
        weights, first, second, average, gradients = (
            [torch.rand(size, generator=generator).to(recorder.device) for size in sizes] for _ in range(5)
        )
        adamw_ema.adamw_ema_(
            *(weights, gradients, first, second, average, [torch.zeros((), device=recorder.device) for _ in sizes]),
            weight_copies=[torch.empty(size, device=recorder.device, dtype=recorder.dtype) for size in sizes],
            average_copies=[torch.empty(size, device=recorder.device, dtype=recorder.dtype) for size in sizes],
            lr=1e-3,
            betas=(0.9, 0.98),
            eps=1e-8,
            weight_decay=0.5,
            momentum=0.99,
            average_first=True,
            skip=torch.zeros((), device=recorder.device),
            triton=triton,
        )
        found.append([*weights, *first, *second, *average])
    errors = [((mine - other).abs() / other.abs().clamp(min=1)).max() for mine, other in zip(*found, strict=True)]
    return max(error.item() for error in errors), tolerance("adamw_ema on a GPU from torch", torch.float32)


def _patches(recorder: Recorder) -> tuple[float, float]:
    """Return how many values differ between the kernel and torch's form on a CPU: none may."""
    crops = [torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8) for side in (224, 96, 33)]
    values = level_values(MEAN, STD, recorder.dtype)
    there = [images.to(recorder.device) for images in crops]
    found = normalised_patches(there, 16, values.to(recorder.device)).cpu()
    return float((found != normalised_patches(crops, 16, values)).sum()), 0.0
