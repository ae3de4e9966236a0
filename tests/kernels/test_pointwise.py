"""The kernels around products and attention: right in Triton's interpreter and on a GPU, and taken where they serve."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cosmos_scale.kernels.pointwise import add_norm, gelu, split_stacked
from cosmos_scale.profiling.operators import META, DeviceCounter
from cosmos_scale.testing.tolerances import tolerance
from tests.kernels.programs import json_lines, needs_triton

pytestmark = needs_triton


def check(rows: Iterable[Any], dtypes: set[str]) -> None:
    """Each case and dtype is there, within its tolerance."""
    seen = set()
    for row in rows:
        seen.add(row["dtype"])
        for name, error in row["errors"].items():
            assert error <= tolerance("pointwise, relative", row["dtype"]), (row["case"], row["dtype"], name)
    assert seen == dtypes


def test_the_interpreted_kernels_equal_float64_at_odd_sizes() -> None:
    check(
        json_lines("-m", "tests.kernels.interpret_pointwise", interpret=True),
        {"torch.float32", "torch.float16"},
    )


@pytest.mark.gpu
def test_the_kernels_equal_float64_on_a_gpu() -> None:
    check(
        json_lines("-m", "tests.kernels.interpret_pointwise", "cuda", interpret=False),
        {"torch.float32", "torch.float16", "torch.bfloat16"},
    )


def test_gradients_that_lie_side_by_side_are_not_copied() -> None:
    rows, heads, width = 5, 2, 16
    for together in (True, False):
        stacked = torch.empty(rows, 3 * width, dtype=torch.bfloat16, device=META, requires_grad=True)
        upstream = torch.empty(rows, 3, heads, width // heads, dtype=torch.bfloat16, device=META)
        gradients = [part if together else part.contiguous() for part in upstream.unbind(1)]
        with DeviceCounter() as counter:
            torch.autograd.backward(split_stacked(stacked, None, heads), gradients)
        (((_, name), count),) = counter.counts.items()
        scratch = 4 * 3 * width  # partial sums: one chunk of rows
        summed, copied = 2 * 3 * width, 0 if together else 2 * 3 * rows * width
        assert (name, count.launches) == ("stack_gradients", 2)
        assert count.written == scratch + summed + copied
        assert count.read == 2 * 3 * rows * width + scratch


def test_a_norm_reads_and_writes_each_row_once() -> None:
    rows, width = 40_000, 64
    x, update = (torch.empty(rows, width, dtype=torch.bfloat16, device=META, requires_grad=True) for _ in range(2))
    gain, offset, bias = (torch.empty(width, device=META, requires_grad=True) for _ in range(3))
    tensor, statistics = 2 * rows * width, 2 * 4 * rows
    counter = DeviceCounter()
    with counter:
        with counter.phase("forward"):
            total, normed = add_norm(x, update, bias, gain, offset, 1e-5)
        with counter.phase("backward"):
            upstream = [torch.empty_like(total), torch.empty_like(normed)]
            torch.autograd.grad([total, normed], [x, update, gain, offset, bias], upstream)
    forward, backward = counter.of_phase("forward"), counter.of_phase("backward")
    assert forward.launches == 1
    assert (forward.read, forward.written) == (2 * tensor + 2 * 4 * width, 2 * tensor + statistics)
    assert backward.launches == 2
    scratch = backward.written - tensor - 3 * 4 * width
    assert backward.read == 3 * tensor + statistics + 4 * width + scratch
    assert 0 < scratch < 0.05 * tensor
    with torch.no_grad(), DeviceCounter() as counter:
        add_norm(x, update, None, gain, offset, 1e-5)
    (count,) = counter.counts.values()
    assert count.written == 2 * tensor, "without gradients no statistics are kept"


def test_nothing_is_summed_for_a_bias_without_gradient() -> None:
    x = torch.empty(5, 64, dtype=torch.bfloat16, device=META, requires_grad=True)
    active = gelu(x, None)
    active.backward(torch.empty_like(active))
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_fake_tensors_run_the_operators_too() -> None:
    with FakeTensorMode():
        x, update = (torch.empty(5, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        gain, offset, bias = (torch.empty(64, requires_grad=True) for _ in range(3))
        total, normed = add_norm(x, update, bias, gain, offset, 1e-5)
        found = torch.autograd.grad([total, normed], [x, update, bias, gain], [total, normed])
    assert [tensor.shape for tensor in found] == [x.shape, x.shape, bias.shape, gain.shape]
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
