"""The dense form of attention, and every back end on strided views of one projection, as the towers call them.

The same body runs here for the back ends that a CPU has, and on a GPU for all that can be imported there. Kernels that
take strides may be wrong for them in the backward alone, at some lengths alone.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cosmos_scale.kernels import attention as kernel
from cosmos_scale.kernels.attention import (
    BACKENDS,
    Backend,
    attention,
    choose_backend,
    gradient_obstacle,
    obstacle,
)
from cosmos_scale.kernels.attention_try import TRY_ERROR
from cosmos_scale.kernels.segments import Segments
from cosmos_scale.testing.tolerances import tolerance
from tests.kernels.test_attention import EVERYTHING, each_case, output_and_gradients, random_tokens, softmax_attention

HEADS, HEAD_SIZE = 3, 64
LENGTHS = {
    "global crops": [197] * 3,
    "local crops": [37] * 5,
    "both": [197] * 2 + [37] * 6,
    "whole captions": [77] * 4,
    "captions": [77, 77, 41, 23, 21, 9],
    "odd": [1, 2, 37, 77, 129, 130, 197, 201],
    "one token each": [1] * 4,
}
CASES = [(name, causal) for name in LENGTHS for causal in (False, True)]


def exact(packed_T3HD: Tensor, lengths: list[int], causal: bool) -> Tensor:
    """The same attention in float32, by torch's plain form, one segment after the other."""
    outputs = []
    with sdpa_kernel(SDPBackend.MATH):
        for part in packed_T3HD.split(lengths):
            q, k, v = part.permute(1, 2, 0, 3)[:, None]
            outputs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)[0])
    return torch.cat(outputs, dim=1).transpose(0, 1)


def compare(backend: Backend, device: torch.device, dtype: torch.dtype, name: str, causal: bool) -> None:
    """Compare output and gradient of the packed projection with those of float32."""
    lengths = LENGTHS[name]
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(sum(lengths), 3, HEADS, HEAD_SIZE, generator=generator).to(device, dtype)
    upstream = torch.randn(sum(lengths), HEADS, HEAD_SIZE, generator=generator).to(device, dtype)

    def ours(packed_T3HD: Tensor) -> Tensor:
        q, k, v = packed_T3HD.unbind(1)
        assert not q.is_contiguous()
        return attention(q, k, v, Segments(lengths), causal, backend)

    def result(run: Callable[[Tensor], Tensor], values: Tensor) -> tuple[Tensor, Tensor]:
        leaf = values.detach().requires_grad_()
        output = run(leaf)
        (gradient,) = torch.autograd.grad(output, leaf, upstream.to(values.dtype))
        return output.detach().float(), gradient.float()

    expected = result(lambda values: exact(values, lengths, causal), packed.float())
    for mine, oracle in zip(result(ours, packed), expected, strict=True):
        error = (mine - oracle).abs().max() / oracle.abs().max()
        assert error <= tolerance("attention, of the largest", dtype), f"{backend}, {name}, causal {causal}: {error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if obstacle(name, torch.device("cpu"), torch.float32, 64) is None]
)
def test_strided_views_on_a_cpu(backend: Backend, dtype: torch.dtype) -> None:
    for name, causal in CASES:
        compare(backend, torch.device("cpu"), dtype, name, causal)


def test_the_dense_form_is_for_equal_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def note(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
        runs.append(len(segments.runs))
        return q

    monkeypatch.setitem(BACKENDS, "dense", note)
    for lengths in LENGTHS.values():
        q = torch.zeros(sum(lengths), HEADS, HEAD_SIZE)
        assert attention(q, q, q, Segments(lengths), backend="dense").shape == q.shape
    assert runs == [1, 1, 2, 1, 1]  # neither captions nor odd lengths


@each_case
def test_the_dense_form_matches_the_formula(queries: list[int], keys: list[int] | None, causal: bool) -> None:
    """With any number of runs of equally long segments, empty ones too."""
    exact, segments = random_tokens(queries, keys), Segments(queries, keys)
    expected = output_and_gradients(
        lambda q, k, v: softmax_attention(q, k, v, queries, queries if keys is None else keys, causal), exact
    )
    dense = BACKENDS["dense"]
    ours = output_and_gradients(lambda q, k, v: dense(q, k, v, segments, causal), [tensor.float() for tensor in exact])
    for mine, oracle in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, oracle, rtol=0, atol=tolerance("attention, absolute", torch.float32))


@pytest.mark.parametrize(
    ("capability", "cudnn", "head_size", "even", "installed", "expected"),
    [
        ((9, 0), 91800, 64, True, EVERYTHING - {"flash_attn_3"}, "dense"),
        ((9, 0), 91800, 64, False, EVERYTHING - {"flash_attn_3"}, "flash_attn_2"),
        ((9, 0), 91800, 64, True, EVERYTHING, "flash_attn_3"),
        ((9, 0), 91700, 64, True, EVERYTHING - {"flash_attn_3"}, "flash_attn_2"),
        ((9, 0), None, 64, True, {"torch_varlen"}, "torch_varlen"),
        ((9, 0), 91800, 256, True, {"flash_attn_2"}, "flash_attn_2"),
        ((8, 0), 91800, 64, True, {"flash_attn_2"}, "flash_attn_2"),
        ((10, 0), 91800, 64, True, {"torch_varlen"}, "torch_varlen"),
    ],
)
def test_auto_takes_the_dense_form_on_hopper_for_equal_lengths(
    capability: tuple[int, int],
    cudnn: int | None,
    head_size: int,
    even: bool,
    installed: set[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(kernel, "find_function", lambda name: print if name in installed else "not here")
    monkeypatch.setattr(kernel, "gradient_obstacle", lambda *_: None)
    choose_backend.cache_clear()
    device = torch.device("cuda", 0)
    assert choose_backend("auto", device, torch.bfloat16, head_size, even) == expected
    # By its name the dense form runs wherever it can; segments of other lengths go the way of `auto`.
    forced = choose_backend("dense", device, torch.bfloat16, head_size, even)
    assert forced == ("dense" if even else choose_backend("auto", device, torch.bfloat16, head_size))
    choose_backend.cache_clear()


def test_auto_passes_over_the_dense_form_where_a_try_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A try is made only where the dense form would be taken: not on other GPUs, not for other lengths."""
    tries: list[str] = []

    def fails(backend: str, *_: object) -> str:
        tries.append(backend)
        return "its gradients are wrong"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91800)
    monkeypatch.setattr(kernel, "find_function", lambda name: print if name == "flash_attn_2" else "not here")
    monkeypatch.setattr(kernel, "gradient_obstacle", fails)
    choose_backend.cache_clear()
    device = torch.device("cuda", 0)
    assert choose_backend("auto", device, torch.bfloat16, 64, False) == "flash_attn_2"
    assert tries == []
    with caplog.at_level("INFO", logger=kernel.__name__):
        assert choose_backend("auto", device, torch.bfloat16, 64, True) == "flash_attn_2"
    assert "flash_attn_2 (flash_attn_3: not here; dense: its gradients are wrong" in caplog.text
    assert tries == ["dense"]
    assert choose_backend("dense", device, torch.bfloat16, 64, True) == "dense"  # by its name: no try
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    choose_backend.cache_clear()
    assert choose_backend("auto", device, torch.bfloat16, 64, True) == "flash_attn_2"
    assert tries == ["dense"]
    choose_backend.cache_clear()


class _Backward(torch.autograd.Function):
    """The dense form with a backward of its own: one that raises, or whose gradients are off by a factor."""

    @staticmethod
    def forward(ctx: Any, packed_THD: Tensor, factor: float | None) -> Tensor:
        ctx.factor = factor
        return packed_THD.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.factor is None:
            raise RuntimeError("No available kernel.\nAborting execution.")
        return gradient * ctx.factor, None


def test_a_try_allows_as_much_as_the_tests() -> None:
    assert tolerance("attention, of the largest", torch.bfloat16) == TRY_ERROR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_try_of_right_gradients_finds_nothing(dtype: torch.dtype) -> None:
    with torch.no_grad():  # the first forward may be the teacher's
        assert gradient_obstacle("dense", torch.device("cpu"), dtype, HEAD_SIZE) is None


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (None, "tried on 5 segments it fails: RuntimeError: No available kernel. Aborting execution."),
        (1.1, "tried on 5 segments its gradients are wrong by 0.1 of the largest"),
        (float("nan"), "tried on 5 segments its gradients are wrong by nan of the largest"),
        (1.0, None),
    ],
)
def test_a_try_tells_what_is_wrong_with_gradients(
    factor: float | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = BACKENDS["dense"]

    def faulty(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
        output: Tensor = _Backward.apply(dense(q, k, v, segments, causal), factor)
        return output

    monkeypatch.setitem(BACKENDS, "dense", faulty)
    gradient_obstacle.cache_clear()
    assert gradient_obstacle("dense", torch.device("cpu"), torch.float32, HEAD_SIZE) == expected
    gradient_obstacle.cache_clear()


def test_a_try_tells_wrong_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "dense", lambda q, k, v, segments, causal: 1.2 * v)
    gradient_obstacle.cache_clear()
    found = gradient_obstacle("dense", torch.device("cpu"), torch.float32, HEAD_SIZE)
    assert found is not None
    assert found.startswith("tried on 5 segments its outputs are wrong by ")
    gradient_obstacle.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_auto_takes_on_a_gpu_has_been_tried(dtype: torch.dtype) -> None:
    """A try comes to the same on this GPU as a step's backward, and `auto` follows it."""
    device = torch.device("cuda", torch.cuda.current_device())
    gradient_obstacle.cache_clear()
    choose_backend.cache_clear()
    chosen = choose_backend("auto", device, dtype, HEAD_SIZE, True)
    if chosen == "dense":
        assert gradient_obstacle("dense", device, dtype, HEAD_SIZE) is None
    if (
        obstacle("dense", device, dtype, HEAD_SIZE) is None
        and gradient_obstacle("dense", device, dtype, HEAD_SIZE) is None
    ):
        compare("dense", device, dtype, "both", False)
    compare("auto", device, dtype, "both", False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_strided_views_on_a_gpu(backend: Backend, dtype: torch.dtype) -> None:
    """Torch's versions choose kernels by length: each length is a launch of its own."""
    device = torch.device("cuda", torch.cuda.current_device())
    reason = None if backend == "auto" else obstacle(backend, device, dtype, HEAD_SIZE)
    if reason:
        pytest.skip(f"{backend}: {reason}")
    for name, causal in CASES:
        compare(backend, device, dtype, name, causal)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernels", kernel.DENSE_KERNELS)
def test_each_dense_kernel_on_a_gpu(kernels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    reason = obstacle("dense", device, dtype, HEAD_SIZE)
    if reason:
        pytest.skip(f"dense: {reason}")
    monkeypatch.setattr(kernel, "DENSE_KERNELS", (kernels,))
    for name, causal in CASES:
        if choose_backend("dense", device, dtype, HEAD_SIZE, Segments(LENGTHS[name]).is_even) == "dense":
            compare("dense", device, dtype, name, causal)
