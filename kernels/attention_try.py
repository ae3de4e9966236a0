"""A try of an attention back end on the device: whether forward and backward run there, and are right."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cosmos_scale.kernels.segments import Segments

TRIED = (197, 197, 37, 37, 37)
"""The lengths of the segments: crops of both sizes of ViT-B/16."""
TRY_ERROR = 3e-2
"""Of the largest result, how far from float32's a result may be: some roundings of bfloat16."""

Attend = Callable[[Tensor, Tensor, Tensor, Segments, bool], Tensor]


def try_gradients(
    attend: Attend, plain: Attend, device: torch.device, dtype: torch.dtype, head_size: int
) -> str | None:
    """Return in a line why forward and backward are not to be used on a device, or None: both run once there.

    attend: attention as back ends have it. It is given strided views of one projection, as the towers give them.
    plain: torch's own attention, whose plain form in float32 says what is right, by TRY_ERROR. The host waits for the
    device. Random numbers are drawn from a generator of its own.
    """
    segments, shape = Segments(TRIED), (sum(TRIED), 3, 2, head_size)
    generator = torch.Generator().manual_seed(0)
    packed_T3HD, upstream_T3HD = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))

    def results(run: Attend, values: Tensor) -> list[Tensor]:
        leaf = values.detach().requires_grad_()
        q, k, v = leaf.unbind(1)
        output = run(q, k, v, segments, False)
        (gradient,) = torch.autograd.grad(output, leaf, upstream_T3HD[:, 0].to(values.dtype))
        return [output.detach().float(), gradient.float()]

    try:
        ours = results(attend, packed_T3HD)
        with sdpa_kernel(SDPBackend.MATH):
            exact = results(plain, packed_T3HD.float())
        errors = [
            float((mine - right).abs().max() / right.abs().max()) for mine, right in zip(ours, exact, strict=True)
        ]
    except Exception as error:  # torch says in many ways that none of its kernels serves
        return f"tried on {len(TRIED)} segments it fails: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}"
    for what, found in zip(("outputs", "gradients"), errors, strict=True):
        if not found <= TRY_ERROR:  # NaN too
            return f"tried on {len(TRIED)} segments its {what} are wrong by {found:.3g} of the largest"
    return None
