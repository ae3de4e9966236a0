"""Attention against the softmax formula in float64."""

import pytest
import torch
from torch import Tensor

from cosmos_scale.kernels.attention import attention

# float32 sums of up to 33 products of order 1; errors of 2e-7 to 2e-6 were seen.
TOLERANCE = 1e-5


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None) -> Tensor:
    """Per sample, head and query: the mean of the visible values, weighted by exp(q.k / sqrt(D))."""
    output = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                weights = (k[b, :, h] @ q[b, i, h] / q.shape[3] ** 0.5).exp()
                if causal:
                    weights = weights * (torch.arange(k.shape[1]) <= i)
                if key_mask is not None:
                    weights = weights * key_mask[b]
                output[b, i, h] = weights @ v[b, :, h] / weights.sum()
    return output


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(7, 7, True), (7, 7, False), (3, 33, False), (1, 1, True)])
def test_output_and_gradients_match_the_formula(queries: int, keys: int, causal: bool, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, queries, 3, 5), (2, keys, 3, 5), (2, keys, 3, 5)]
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    ours = [tensor.detach().float().requires_grad_() for tensor in exact]
    key_mask = None
    if masked:
        key_mask = torch.rand(2, keys, generator=generator) < 0.6
        key_mask[:, 0] = True  # every query sees something
    weights = torch.randn(2, queries, 3, 5, generator=generator, dtype=torch.float64)

    expected = softmax_attention(exact[0], exact[1], exact[2], causal, key_mask)
    output = attention(ours[0], ours[1], ours[2], causal=causal, key_mask_BS=key_mask)
    (expected * weights).sum().backward()
    (output * weights.float()).sum().backward()

    torch.testing.assert_close(output.double(), expected, rtol=0, atol=TOLERANCE)
    for mine, oracle in zip(ours, exact, strict=True):
        assert mine.grad is not None
        assert oracle.grad is not None
        torch.testing.assert_close(mine.grad.double(), oracle.grad, rtol=0, atol=TOLERANCE)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k = torch.zeros(1, 2, 1, 4), torch.zeros(1, 3, 1, 4)
    with pytest.raises(ValueError, match="as many queries as keys, not 2 and 3"):
        attention(q, k, k, causal=True)
    with pytest.raises(ValueError, match="key_mask"):
        attention(q, k, k, key_mask_BS=torch.ones(1, 2, dtype=torch.bool))
