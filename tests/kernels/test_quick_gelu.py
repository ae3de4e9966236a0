"""QuickGELU against its formula in float64 and against open_clip's module."""

import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor

from cosmos_scale.kernels.quick_gelu import quick_gelu
from cosmos_scale.testing.tolerances import tolerance


def value_and_gradient(function: torch.nn.Module | None, x: Tensor, upstream: Tensor) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    active: Tensor = quick_gelu(leaf) if function is None else function(leaf)
    active.backward(upstream)
    assert leaf.grad is not None
    return [active.detach(), leaf.grad]


def check(dtype: torch.dtype, device: str) -> None:
    """Value and gradient equal the formula's in float64, relative by norm."""
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(37, 100, generator=generator).to(device, dtype) for _ in range(2))
    x = 3 * x  # the tails too
    x64, upstream64 = x.double().cpu(), upstream.double().cpu()
    sigmoid = 1 / (1 + (-1.702 * x64).exp())
    wanted = [x64 * sigmoid, upstream64 * (sigmoid + 1.702 * x64 * sigmoid * (1 - sigmoid))]
    for found, oracle in zip(value_and_gradient(None, x, upstream), wanted, strict=True):
        assert found.dtype == dtype
        error = ((found.double().cpu() - oracle).norm() / oracle.norm()).item()
        assert error <= tolerance("pointwise, relative", dtype), error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_equals_the_formula_in_float64(dtype: torch.dtype) -> None:
    check(dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_equals_the_formula_in_float64_on_a_gpu(dtype: torch.dtype) -> None:
    check(dtype, "cuda")


def test_it_equals_open_clips() -> None:
    """In float64; the gradient's terms are added in another order."""
    generator = torch.Generator().manual_seed(1)
    x, upstream = (4 * torch.randn(200, dtype=torch.float64, generator=generator) for _ in range(2))
    theirs = value_and_gradient(QuickGELU(), x, upstream)
    for found, oracle in zip(value_and_gradient(None, x, upstream), theirs, strict=True):
        torch.testing.assert_close(found, oracle, rtol=1e-14, atol=1e-14)


def test_the_backward_keeps_the_input_alone() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(5, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        quick_gelu(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]
