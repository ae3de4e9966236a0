"""The linear map: against float64 on either side of the size from which oneDNN multiplies, and against torch's own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_scale.kernels import linear as kernel
from cosmos_scale.kernels.linear import LEAST_WORK
from cosmos_scale.testing.tolerances import tolerance
from tests.model.models import SMALL, initialised, small_batch

linear = partial(kernel.linear, steady=True)

INPUTS, OUTPUTS = 512, 384
ENOUGH = -(-LEAST_WORK // (INPUTS * OUTPUTS))  # rows from which oneDNN is taken
TOLERANCE = tolerance("linear, absolute", torch.float32)


def problem(rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, INPUTS), (OUTPUTS, INPUTS), (OUTPUTS,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def with_gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    output = function(*inputs)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient.to(output.dtype))]


class Called(TorchDispatchMode):
    """Whether oneDNN's product was called, and of which shapes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.onednn = False
        self.shapes: set[tuple[torch.Size, torch.Size]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_linear_pointwise" in func.name():
            self.onednn = True
            self.shapes.add((args[0].shape, args[1].shape))
        return func(*args, **(kwargs or {}))


needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no oneDNN",
)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [ENOUGH - 1, ENOUGH, ENOUGH + 3])
def test_output_and_gradients_match_float64(rows: int, bias: bool) -> None:
    exact = problem(rows)[: 3 if bias else 2]
    expected = with_gradients(functional.linear, exact)
    ours = with_gradients(linear, [tensor.float() for tensor in exact])
    for mine, oracle in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.double(), oracle, rtol=0, atol=TOLERANCE)


@needs_onednn
def test_only_gradients_that_are_asked_for_are_computed() -> None:
    x, weight, bias = (tensor.float() for tensor in problem(ENOUGH))
    output = linear(x, weight.requires_grad_(), bias)
    assert output.grad_fn is not None
    with Called() as called:
        output.sum().backward()
    assert not called.onednn, "the gradient of pixels"
    assert weight.grad is not None
    assert x.grad is bias.grad is None


@needs_onednn
def test_inputs_may_be_views() -> None:
    x, weight, bias = (tensor.float() for tensor in problem(ENOUGH))
    wide, stacked = x.repeat(1, 2), torch.cat([weight, weight])
    torch.testing.assert_close(
        linear(wide[:, INPUTS:], stacked[OUTPUTS:], bias), linear(x, weight, bias), rtol=0, atol=TOLERANCE
    )


@needs_onednn
def test_one_dnn_multiplies_where_it_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    def takes_onednn(rows: int, dtype: torch.dtype = torch.float32) -> bool:
        with Called() as called:
            linear(*(tensor.to(dtype) for tensor in problem(rows)))
        return bool(called.onednn)

    assert takes_onednn(ENOUGH)
    assert not takes_onednn(ENOUGH - 1)
    assert not takes_onednn(ENOUGH, torch.float64)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not takes_onednn(ENOUGH)
    monkeypatch.setattr(kernel, "LEAST_WORK", 0)
    assert takes_onednn(1)


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


@needs_onednn
@pytest.mark.parametrize("text_padding", ["attend", "mask"])
def test_captions_of_other_lengths_bring_one_dnn_no_new_shapes(
    text_padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each would stay in memory: gigabytes after some hundred steps.
    monkeypatch.setattr(kernel, "LEAST_WORK", 0)
    model = initialised(SMALL.model_copy(update={"text_padding": text_padding}))
    seen, tokens = [], set()
    for seed in range(3):
        batch = small_batch(3, seed=seed)
        tokens.add(int(batch.caption_lengths.sum()))
        with Called() as called:
            sum(feature.sum() for feature in model(batch)[:4]).backward()
            model.teacher_features(batch, 2)
        seen.append(called.shapes)
    assert len(tokens) == 3
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) > 10, "the image tower's layers"
