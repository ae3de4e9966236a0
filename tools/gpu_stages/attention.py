"""Every attention back end that runs here against float32 attention, outputs and gradients, and its time."""

from typing import NamedTuple

import torch
from torch import Tensor

from cosmos_scale.kernels.attention import BACKENDS, Backend, attention, choose_backend, obstacle
from cosmos_scale.kernels.segments import Segments
from cosmos_scale.testing.tolerances import tolerance
from tools.gpu_stages.recorder import Recorder, failure, relative_error

HEAD = 64


class Case(NamedTuple):
    """Packed attention as the model has it. keys: None where queries, keys and values are one stacked projection."""

    queries: list[int]
    keys: list[int] | None
    causal: bool
    heads: int


def cases(samples: int) -> dict[str, Case]:
    """Return the four kinds of attention of a step, and odd lengths."""
    generator = torch.Generator().manual_seed(0)
    captions = sorted(torch.randint(8, 78, (8 * samples,), generator=generator).tolist(), reverse=True)
    return {
        "image": Case([197] * 2 * samples + [37] * 6 * samples, None, causal=False, heads=12),
        "text": Case(captions, None, causal=True, heads=8),
        "captions to patches": Case([8] * samples, [196] * samples, causal=False, heads=8),
        "crops to words": Case([8] * samples, [77] * samples, causal=False, heads=8),
        "odd lengths": Case([1, 2, 37, 77, 129, 130, 197, 201], None, causal=False, heads=12),
    }


def check(recorder: Recorder) -> None:
    """Write a row for each case and back end: errors, whether they are within the tolerance, and times."""
    for name, case in cases(2 if recorder.tiny else 64).items():
        stacked, upstream = _inputs(case, recorder)
        exact = stacked.detach().float().requires_grad_()
        expected = _attend(exact, case, "sdpa")
        (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.float())
        for backend in BACKENDS:
            reason = obstacle(backend, recorder.device, recorder.dtype, HEAD)
            even = Segments(case.queries, case.keys).is_even
            if not reason and choose_backend(backend, recorder.device, recorder.dtype, HEAD, even) != backend:
                reason = "its segments are not equally long"
            if reason:
                recorder.write(case=name, backend=backend, cannot_run=reason)
                continue
            try:
                _check_one(recorder, name, case, backend, stacked, upstream, expected.detach(), expected_gradient)  # type: ignore[arg-type]
            except Exception as error:
                recorder.write(case=name, backend=backend, ok=False, failed=failure(error))


def _check_one(
    recorder: Recorder,
    name: str,
    case: Case,
    backend: Backend,
    stacked: Tensor,
    upstream: Tensor,
    expected: Tensor,
    expected_gradient: Tensor,
) -> None:
    output = _attend(stacked, case, backend)
    (gradient,) = torch.autograd.grad(output, stacked, upstream)
    errors = relative_error(output.detach(), expected), relative_error(gradient, expected_gradient)
    plain = stacked.detach()
    recorder.write(
        case=name,
        backend=backend,
        output_error=errors[0],
        gradient_error=errors[1],
        ok=max(errors) <= tolerance("attention, relative", recorder.dtype),
        forward_ms=recorder.milliseconds(lambda: _attend(plain, case, backend)),
        forward_backward_ms=recorder.milliseconds(
            lambda: torch.autograd.grad(_attend(stacked, case, backend), stacked, upstream)
        ),
    )


def _inputs(case: Case, recorder: Recorder) -> tuple[Tensor, Tensor]:
    """Return queries, keys and values as the model stacks them, a leaf, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    queries, width = sum(case.queries), case.heads * HEAD
    shape = (queries, 3 * width) if case.keys is None else (queries + 2 * sum(case.keys), width)
    stacked = torch.randn(shape, generator=generator).to(recorder.device, recorder.dtype).requires_grad_()
    upstream = torch.randn(queries, case.heads, HEAD, generator=generator).to(recorder.device, recorder.dtype)
    return stacked, upstream


def _attend(stacked: Tensor, case: Case, backend: Backend) -> Tensor:
    segments = Segments(case.queries, case.keys)
    if case.keys is None:  # strided views of one projection
        q, k, v = stacked.unflatten(-1, (3, case.heads, HEAD)).unbind(1)
    else:
        parts = stacked.unflatten(-1, (case.heads, HEAD)).split([segments.query_tokens, *[segments.key_tokens] * 2])
        q, k, v = parts
    return attention(q, k, v, segments, case.causal, backend)
