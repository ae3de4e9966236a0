"""Attention over segments against the softmax formula in float64, and what the GPU back ends are given."""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cosmos_scale.kernels import attention as kernel
from cosmos_scale.kernels.attention import BACKENDS, attention, choose_backend, obstacle
from cosmos_scale.kernels.segments import Segments
from cosmos_scale.testing.tolerances import tolerance

TOLERANCE = tolerance("attention, absolute", torch.float32)
HEADS, HEAD_SIZE = 3, 8
CPU = torch.device("cpu")

SELF = {
    "one segment": [7],
    "equal, a view": [5, 5, 5],
    "two sizes, two views": [50, 50, 10, 10, 10],
    "odd, one padded bucket": [33, 31, 30, 29, 29, 27],
    "several buckets": [77, 77, 76, 41, 23, 21, 11, 7, 3, 2, 1, 1],
    "unsorted": [1, 33, 2, 31, 7, 7],
    "empty among others": [0, 5, 0, 0, 4, 5, 0],
    "one token each": [1, 1, 1],
}
CROSS = {
    "poolers": ([8, 8, 8], [49, 49, 49]),
    "poolers over cut captions": ([8, 8, 8, 8], [20, 23, 21, 17]),
    "everything differs": ([3, 4, 1, 9, 8], [33, 30, 2, 77, 70]),
    "queries differ": ([6, 5, 6], [9, 9, 9]),
    "keys that nobody asks": ([4, 0, 4, 0], [6, 3, 5, 0]),
}
CASES: dict[str, tuple[list[int], list[int] | None, bool]] = {
    **{f"{name}, self": (lengths, None, False) for name, lengths in SELF.items()},
    **{f"{name}, causal": (lengths, None, True) for name, lengths in SELF.items()},
    **{f"{name}, cross": (queries, keys, False) for name, (queries, keys) in CROSS.items()},
}
each_case = pytest.mark.parametrize(("queries", "keys", "causal"), CASES.values(), ids=CASES)


def softmax_attention(
    q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, queries: Sequence[int], keys: Sequence[int], causal: bool
) -> Tensor:
    """Per segment: the mean of the visible values, weighted by exp(q.k / sqrt(D))."""
    outputs = []
    for q, k, v in zip(q_THD.split(list(queries)), k_SHD.split(list(keys)), v_SHD.split(list(keys)), strict=True):
        weights = (torch.einsum("lhd,shd->hls", q, k) / q.shape[-1] ** 0.5).exp()
        if causal:
            weights = weights.tril()
        sums = weights.sum(-1, keepdim=True)
        outputs.append(torch.einsum("hls,shd->lhd", weights / sums, v))
    return torch.cat(outputs)


def random_tokens(queries: Sequence[int], keys: Sequence[int] | None) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def tokens(lengths: Sequence[int]) -> Tensor:
        return torch.randn(sum(lengths), HEADS, HEAD_SIZE, generator=generator, dtype=torch.float64)

    return tokens(queries), tokens(queries if keys is None else keys), tokens(queries if keys is None else keys)


def output_and_gradients(run: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The result and its gradients, for random gradients of the result; all in float64."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = run(*inputs)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    output.backward(gradient.to(output))
    return [output.detach().double().cpu(), *(_gradient(tensor).double().cpu() for tensor in inputs)]


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


@each_case
def test_output_and_gradients_match_the_formula(queries: list[int], keys: list[int] | None, causal: bool) -> None:
    exact, segments = random_tokens(queries, keys), Segments(queries, keys)
    expected = output_and_gradients(
        lambda q, k, v: softmax_attention(q, k, v, queries, queries if keys is None else keys, causal), exact
    )
    ours = output_and_gradients(
        lambda q, k, v: attention(q, k, v, segments, causal), [tensor.float() for tensor in exact]
    )
    for mine, oracle in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, oracle, rtol=0, atol=TOLERANCE)


def test_queries_keys_and_values_may_be_parts_of_one_projection() -> None:
    lengths = [9, 9, 8, 4]
    packed = torch.stack(random_tokens(lengths, None), dim=1)
    segments = Segments(lengths)
    expected = output_and_gradients(
        lambda x: softmax_attention(x[:, 0], x[:, 1], x[:, 2], lengths, lengths, True), [packed]
    )
    ours = output_and_gradients(lambda x: attention(x[:, 0], x[:, 1], x[:, 2], segments, True), [packed.float()])
    for mine, oracle in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, oracle, rtol=0, atol=TOLERANCE)


def test_no_queries_give_no_rows() -> None:
    for queries, keys in (([], []), ([0, 0], [3, 0])):
        q, k = torch.zeros(0, 1, 8), torch.zeros(sum(keys), 1, 8)
        assert attention(q, k, k, Segments(queries, keys)).shape == (0, 1, 8)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k = torch.zeros(2, 1, 8), torch.zeros(3, 1, 8)
    with pytest.raises(ValueError, match="as many queries as keys"):
        attention(q, k, k, Segments([2], [3]), causal=True)
    with pytest.raises(ValueError, match="2 queries, 3 keys and 3 values, but the segments hold 2 and 2 tokens"):
        attention(q, k, k, Segments([2]))
    with pytest.raises(ValueError, match=r"\[2, 8\], \[2, 8\] and \[2, 8\] must be \[tokens, heads, width of one\]"):
        attention(q[:, 0], q[:, 0], q[:, 0], Segments([2]))
    with pytest.raises(ValueError, match=r"\[2, 3, 8\], \[2, 1, 8\] and \[2, 1, 8\] must be"):
        attention(q.expand(2, 3, 8), q, q, Segments([2]))
    with pytest.raises(ValueError, match=r"float32, torch\.float64 and torch\.float32 must be one dtype"):
        attention(q, q.double(), q, Segments([2]))


@pytest.fixture(autouse=True)
def no_stand_in_stays() -> Iterator[None]:
    """Leave imported packages as they were: a stand-in for flash-attn would break the import of xformers."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "flash_attn"}
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]
    sys.modules.update(before)


def test_auto_takes_sdpa_on_a_cpu_and_logs_it_once(caplog: pytest.LogCaptureFixture) -> None:
    choose_backend.cache_clear()
    q = torch.zeros(2, 1, 8)
    with caplog.at_level(logging.INFO, logger=kernel.__name__):
        for _ in range(3):
            attention(q, q, q, Segments([2]))
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith("heads of 8: sdpa")


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("sdpa", "dense")])
def test_a_forced_back_end_that_cannot_run_says_why(backend: Any) -> None:
    q = torch.zeros(2, 1, 8)
    with pytest.raises(ValueError, match=f"back end '{backend}' cannot run: it needs a CUDA device, not cpu"):
        attention(q, q, q, Segments([2]), backend=backend)


def test_an_unknown_back_end_is_refused_with_those_there_are() -> None:
    q = torch.zeros(2, 1, 8)
    with pytest.raises(ValueError, match=r"no back end 'flash'; there are auto, flash_attn_3, .*sdpa"):
        attention(q, q, q, Segments([2]), backend="flash")  # type: ignore[arg-type]


EVERYTHING = set(BACKENDS)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "installed", "expected"),
    [
        ((9, 0), torch.bfloat16, 64, EVERYTHING, "flash_attn_3"),
        ((10, 0), torch.bfloat16, 64, EVERYTHING, "flash_attn_2"),
        ((10, 0), torch.bfloat16, 64, {"flash_attn_4", "flash_attn_3"}, "sdpa"),
        ((9, 0), torch.float16, 64, EVERYTHING - {"flash_attn_3"}, "flash_attn_2"),
        ((8, 0), torch.bfloat16, 64, EVERYTHING, "flash_attn_2"),
        ((9, 0), torch.bfloat16, 256, EVERYTHING, "flash_attn_3"),
        ((9, 0), torch.bfloat16, 64, {"torch_varlen", "xformers"}, "torch_varlen"),
        ((8, 6), torch.bfloat16, 64, {"xformers"}, "xformers"),
        ((8, 0), torch.bfloat16, 64, set(), "sdpa"),
        ((8, 0), torch.float32, 64, EVERYTHING, "sdpa"),
        ((8, 0), torch.bfloat16, 20, EVERYTHING, "sdpa"),
        ((7, 5), torch.float16, 64, EVERYTHING, "sdpa"),
    ],
)
def test_auto_goes_by_device_dtype_head_size_and_what_is_installed(
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_size: int,
    installed: set[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(kernel, "find_function", lambda name: print if name in installed else "not here")
    choose_backend.cache_clear()
    assert choose_backend("auto", device, dtype, head_size) == expected
    choose_backend.cache_clear()
    if not installed:
        assert obstacle("flash_attn_2", device, dtype, head_size) == "not here"


def test_a_block_of_steps_asks_for_no_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")
    asked: list[object] = []
    signature = inspect.signature

    def counted(function: Callable[..., Any]) -> inspect.Signature:
        asked.append(function)
        return signature(function)

    def stand_in(q: Tensor, *_: object, is_causal: bool = False) -> Tensor:
        return q

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(inspect, "signature", counted)
    kernel.find_function.cache_clear()
    (q, k, v), segments = random_tokens([3, 2], None), Segments([3, 2])
    for _ in range(50):
        BACKENDS["torch_varlen"](q, k, v, segments, False)
    kernel.find_function.cache_clear()
    assert len(asked) == 1


def test_an_empty_flash_attn_namespace_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn").mkdir()  # what flash-attn 4 leaves beside its own folder `cute`
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    kernel.find_function.cache_clear()
    import flash_attn

    assert not hasattr(flash_attn, "flash_attn_varlen_func")
    assert str(kernel.find_function("flash_attn_2")).startswith("its function cannot be imported: ImportError: ")
    assert "No module named 'flash_attn.cute'" in str(kernel.find_function("flash_attn_4"))
    kernel.find_function.cache_clear()
    monkeypatch.delitem(sys.modules, "flash_attn")


def test_a_package_that_fails_in_any_way_while_it_loads_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('built for CUDA 11,\\nfound 13')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    kernel.find_function.cache_clear()
    reason = "its function cannot be imported: RuntimeError: built for CUDA 11, found 13"
    assert obstacle("flash_attn_2", torch.device("cuda", 0), torch.bfloat16, 64) == reason
    kernel.find_function.cache_clear()


def varlen_on_the_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, longest: tuple[int, int], causal: bool
) -> Tensor:
    """What a varlen kernel computes from its arguments, which must be as kernels want them."""
    assert cu_queries.dtype == cu_keys.dtype == torch.int32
    lengths = [cu_queries.diff().tolist(), cu_keys.diff().tolist()]
    assert (cu_queries[0].item(), cu_queries[-1].item()) == (0, q.shape[0])
    assert (cu_keys[0].item(), cu_keys[-1].item()) == (0, k.shape[0])
    assert longest == (max(lengths[0]), max(lengths[1]))
    assert all(type(length) is int for length in longest), "kernels take plain integers"
    return softmax_attention(q, k, v, lengths[0], lengths[1], causal)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """flash-attn 2's function by its documented arguments."""
    return varlen_on_the_cpu(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), causal)


def compare_with_the_formula(backend: str, queries: list[int], keys: list[int] | None, causal: bool) -> None:
    (q, k, v), segments = random_tokens(queries, keys), Segments(queries, keys)
    ours = BACKENDS[backend](q, k, v, segments, causal)
    expected = softmax_attention(q, k, v, queries, queries if keys is None else keys, causal)
    assert torch.equal(ours, expected)
    again = segments.cu_seqlens(CPU)
    assert all(first is second for first, second in zip(again, segments.cu_seqlens(CPU), strict=True)), "made once"


@each_case
@pytest.mark.parametrize("version", [2, 3, 4])
def test_flash_attn_is_given_the_segments(
    version: int, queries: list[int], keys: list[int] | None, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, cute, interface = (ModuleType(name) for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"))
    if version == 2:
        package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    elif version == 3:
        interface.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    else:  # returns the log-sum-exp too
        cute.flash_attn_varlen_func = lambda *args, **kwargs: (  # type: ignore[attr-defined]
            flash_attn_varlen_func(*args, **kwargs),
            None,
        )
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", interface)
    kernel.find_function.cache_clear()
    compare_with_the_formula(f"flash_attn_{version}", queries, keys, causal)
    for other in {2, 3, 4} - {version}:
        assert isinstance(kernel.find_function(f"flash_attn_{other}"), str)
    kernel.find_function.cache_clear()


@each_case
@pytest.mark.parametrize("new", [True, False])
def test_torch_varlen_is_given_the_segments(
    new: bool, queries: list[int], keys: list[int] | None, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")
    real = inspect.signature(varlen.varlen_attn)

    def with_window(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
        *, window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        if "window_size" in real.parameters:  # the installed torch must take what we pass
            real.bind(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)
        assert window_size in ((-1, -1), (-1, 0))
        return varlen_on_the_cpu(query, key, value, cu_seq_q, cu_seq_k, (max_q, max_k), window_size == (-1, 0))

    def with_flag(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
        is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        return varlen_on_the_cpu(query, key, value, cu_seq_q, cu_seq_k, (max_q, max_k), is_causal)

    monkeypatch.setattr(varlen, "varlen_attn", with_window if new else with_flag)
    kernel.find_function.cache_clear()
    compare_with_the_formula("torch_varlen", queries, keys, causal)
    kernel.find_function.cache_clear()


@each_case
def test_torch_varlen_accepts_our_tensors_in_both_directions(
    queries: list[int], keys: list[int] | None, causal: bool
) -> None:
    pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")
    kernel.find_function.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (tensor.bfloat16().requires_grad_() for tensor in random_tokens(queries, keys))
        output = BACKENDS["torch_varlen"](q, k, v, Segments(queries, keys), causal)
        assert (output.shape, output.dtype) == (q.shape, torch.bfloat16)
        output.backward(torch.ones_like(output))
        assert [_gradient(tensor).shape for tensor in (q, k, v)] == [q.shape, k.shape, v.shape]


def test_xformers_mask_is_that_of_the_segments() -> None:
    pytest.importorskip("xformers.ops.fmha.attn_bias", reason="xformers is not installed")
    for name, (queries, keys, causal) in CASES.items():
        segments = Segments(queries, keys)
        mask = kernel.xformers_mask(segments, causal, CPU)
        blocks = [torch.ones(pair) for pair in zip(segments.queries, segments.keys, strict=True)]
        expected = torch.block_diag(*(block.tril() if causal else block for block in blocks)).bool()
        materialised = mask.materialize((segments.query_tokens, segments.key_tokens))
        assert torch.equal(materialised, torch.where(expected, 0.0, -torch.inf)), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_every_back_end_agrees_on_a_gpu(backend: Any, dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    reason = obstacle(backend, device, dtype, HEAD_SIZE)
    if reason:
        pytest.skip(f"{backend}: {reason}")
    limit = tolerance("attention on a GPU, of the largest", dtype)
    for name, (queries, keys, causal) in CASES.items():
        tensors = [tensor.to(dtype) for tensor in random_tokens(queries, keys)]
        segments = Segments(queries, keys)

        def formula(q: Tensor, k: Tensor, v: Tensor, segments: Segments = segments, causal: bool = causal) -> Tensor:
            return softmax_attention(q, k, v, segments.queries, segments.keys, causal)

        def ours(q: Tensor, k: Tensor, v: Tensor, segments: Segments = segments, causal: bool = causal) -> Tensor:
            return attention(q, k, v, segments, causal, backend=backend)

        expected = output_and_gradients(formula, [tensor.double() for tensor in tensors])
        results = output_and_gradients(ours, [tensor.to(device) for tensor in tensors])
        for mine, oracle in zip(results, expected, strict=True):
            assert (mine - oracle).abs().max() <= limit * max(1.0, oracle.abs().max().item()), name
