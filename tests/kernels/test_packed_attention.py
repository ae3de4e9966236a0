"""flash-attn 2 takes stacked queries, keys and values as one tensor, so that nobody stacks their gradients again."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos_scale.kernels import attention as kernel
from cosmos_scale.kernels.pointwise import split_stacked
from cosmos_scale.kernels.segments import Segments
from cosmos_scale.profiling.operators import META, DeviceCounter
from cosmos_scale.testing.tolerances import tolerance
from tests.kernels.programs import needs_triton
from tests.kernels.test_attention import softmax_attention

QUERIES, HEADS, WIDTH = [5, 2, 9], 3, 8  # of a head


class _QkvPacked(torch.autograd.Function):
    """What flash-attn's function does with the gradient: it makes one tensor for all three."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, causal: bool) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.causal = causal
        q, k, v = qkv.unbind(1)
        return torch.empty_like(q) if qkv.is_meta else softmax_attention(q, k, v, QUERIES, QUERIES, causal)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (qkv,) = ctx.saved_tensors
        gradient = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        if not qkv.is_meta:
            with torch.enable_grad():
                leaf = qkv.detach().requires_grad_()
                q, k, v = leaf.unbind(1)
                output = softmax_attention(q, k, v, QUERIES, QUERIES, ctx.causal)
            gradient.copy_(torch.autograd.grad(output, leaf, upstream)[0])
        return gradient, None


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """flash-attn 2's function by its documented arguments."""
    assert qkv.shape == (sum(QUERIES), 3, HEADS, WIDTH)
    assert qkv.is_meta or cu_seqlens.tolist() == [0, 5, 7, 16]
    assert max_seqlen == 9
    output: Tensor = _QkvPacked.apply(qkv, causal)
    return output


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    package = ModuleType("flash_attn")
    vars(package)["flash_attn_varlen_qkvpacked_func"] = flash_attn_varlen_qkvpacked_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    kernel.find_function.cache_clear()
    yield
    kernel.find_function.cache_clear()


@pytest.mark.parametrize("causal", [True, False])
def test_output_and_gradient_equal_the_formula(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    stacked = torch.randn(sum(QUERIES), 3, HEADS, WIDTH, generator=generator, dtype=torch.float64)
    results = []
    for packed in (True, False):
        leaf = stacked.clone().requires_grad_()
        q, k, v = leaf.view(sum(QUERIES), 3, HEADS, WIDTH).unbind(1)
        if packed:
            output = kernel.BACKENDS["flash_attn_2"](q, k, v, Segments(QUERIES), causal)
        else:
            output = softmax_attention(q, k, v, QUERIES, QUERIES, causal)
        output.backward(torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output))
        assert leaf.grad is not None
        results.append((output.detach(), leaf.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance("attention, absolute", torch.float64))


@needs_triton
def test_its_gradient_is_summed_where_it_lies() -> None:
    row = 3 * HEADS * WIDTH
    stacked = torch.empty(sum(QUERIES), row, dtype=torch.bfloat16, device=META, requires_grad=True)
    bias = torch.empty(row, dtype=torch.bfloat16, device=META, requires_grad=True)
    output = kernel.BACKENDS["flash_attn_2"](*split_stacked(stacked, bias, HEADS), Segments(QUERIES), False)
    with DeviceCounter() as counter:
        torch.autograd.grad(output, (stacked, bias), torch.empty_like(output))
    assert {name for _, name in counter.counts} == {"stack_gradients"}
    (count,) = counter.counts.values()
    assert count.written == 4 * row + 2 * row, "partial sums and the bias's gradient, no copy of the gradients"
