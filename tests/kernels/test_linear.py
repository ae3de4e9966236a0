"""The linear map that keeps its weight by name, against torch's own."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cosmos_scale.kernels.linear import linear

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_output_and_gradients_are_torchs_own_bit_for_bit(tokens: int, with_bias: bool, dtype: torch.dtype) -> None:
    results = []
    for function in (linear, functional.linear):
        x = draw(tokens, 33, dtype=dtype, seed=0).requires_grad_()
        weight = nn.Parameter(draw(65, 33, dtype=dtype, seed=1))
        bias = nn.Parameter(draw(65, dtype=dtype, seed=2)) if with_bias else None
        output = function(x, weight, bias)
        output.backward(draw(tokens, 65, dtype=dtype, seed=3))
        results.append([output, x.grad, weight.grad, None if bias is None else bias.grad])
    for ours, theirs in zip(*results, strict=True):
        if theirs is None:
            assert ours is None
        else:
            assert ours is not None
            assert ours.dtype == dtype
            assert torch.equal(ours, theirs)


def test_gradients_are_those_of_finite_differences() -> None:
    inputs = [draw(4, 3, dtype=torch.float64, seed=0), draw(5, 3, dtype=torch.float64, seed=1)]
    inputs.append(draw(5, dtype=torch.float64, seed=2))
    assert torch.autograd.gradcheck(linear, [tensor.requires_grad_() for tensor in inputs])


def test_weight_may_go_away_between_forward_and_backward() -> None:
    """As at ZeRO's stage 3, where the parameter's memory is given up and comes back elsewhere."""
    x = draw(6, 3, dtype=torch.float32, seed=0).requires_grad_()
    weight = nn.Parameter(draw(5, 3, dtype=torch.float32, seed=1))
    values = weight.detach().clone()
    output = linear(x, weight)
    held = weight.untyped_storage()._weak_ref()
    weight.data = torch.empty(0)
    assert torch.UntypedStorage._expired(held), "the graph holds the weight's memory"
    weight.data = values
    output.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(6, 5) @ values)


def test_what_needs_no_gradient_gets_none() -> None:
    x, weight = draw(6, 3, dtype=torch.float32, seed=0), nn.Parameter(draw(5, 3, dtype=torch.float32, seed=1))
    weight.requires_grad_(False)
    assert not linear(x, weight).requires_grad
    linear(x.requires_grad_(), weight).sum().backward()
    assert weight.grad is None
    assert x.grad is not None
