"""Attention over segments of packed tokens: one function for both towers and both poolers, and its back ends.

A segment is one view: a segment's queries attend to the same segment's keys only.
"""

import inspect
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cosmos_scale.kernels.attention_try import try_gradients
from cosmos_scale.kernels.pointwise import side_by_side
from cosmos_scale.kernels.segments import Segments
from cosmos_scale.kernels.serving import stands_for_gpu

logger = logging.getLogger(__name__)

Backend = Literal["auto", "flash_attn_3", "dense", "flash_attn_2", "torch_varlen", "xformers", "flash_attn_4", "sdpa"]

DENSE_KERNELS = ("CUDNN_ATTENTION", "FLASH_ATTENTION")
"""What `dense` runs on a GPU: the first of torch's kernels that takes the tensors; never its slow ones."""
DENSE_CUDNN = 91800
"""The least cuDNN (9.18) that `auto` trusts with `dense`: from it on torch itself prefers cuDNN on Hopper."""
DENSE_HEAD = 128
"""The widest head whose backward cuDNN computes on Hopper in all of these versions."""


def attention(
    q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, segments: Segments, causal: bool = False, backend: Backend = "auto"
) -> Tensor:
    """Attend inside each segment, in every head; returns [T, H, D].

    q: [T, H, D]; k, v: [S, H, D]: the packed tokens of all segments, in one floating dtype. D is the width of one head.
    causal: query i of a segment sees the segment's keys 0..i; each segment then needs as many queries as keys. Logits
    are scaled by D^-1/2.
    backend: `auto` takes the first of BACKENDS that runs with the tensors' device, dtype and D, and logs it once;
    those of BY_NAME_ALONE it does not take, and `dense` only after a try of its gradients. `dense` wants segments that
    are equally long but for a few changes, as crops are; others go the way of `auto`.
    Raises ValueError for shapes or dtypes that do not fit one another, and for a back end that cannot run here.
    """
    shapes = [list(tensor.shape) for tensor in (q_THD, k_SHD, v_SHD)]
    if q_THD.dim() != 3 or not shapes[0][1:] == shapes[1][1:] == shapes[2][1:]:
        raise ValueError(f"attention: {shapes[0]}, {shapes[1]} and {shapes[2]} must be [tokens, heads, width of one]")
    if not q_THD.dtype == k_SHD.dtype == v_SHD.dtype:
        raise ValueError(f"attention: {q_THD.dtype}, {k_SHD.dtype} and {v_SHD.dtype} must be one dtype")
    if q_THD.shape[0] != segments.query_tokens or not k_SHD.shape[0] == v_SHD.shape[0] == segments.key_tokens:
        raise ValueError(
            f"attention: {q_THD.shape[0]} queries, {k_SHD.shape[0]} keys and {v_SHD.shape[0]} values, but the segments "
            f"hold {segments.query_tokens} and {segments.key_tokens} tokens"
        )
    if causal and segments.queries != segments.keys:
        raise ValueError("attention: causal segments need as many queries as keys")
    if not segments.query_tokens:
        return torch.empty_like(q_THD)
    even = segments.is_even and (backend == "dense" or q_THD.is_cuda)  # asked for only where the answer depends on it
    name = choose_backend(backend, q_THD.device, q_THD.dtype, q_THD.shape[-1], even)
    return BACKENDS[name](q_THD, k_SHD, v_SHD, segments, causal)


@lru_cache(maxsize=64)
def choose_backend(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_size: int, even: bool = False
) -> str:
    """Return the name of the back end to run: for `auto` the first that can run here.

    even: whether the segments are `Segments.is_even`. Raises ValueError where a named back end does not exist or cannot
    run here.
    """
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"attention: no back end {backend!r}; there are auto, {', '.join(BACKENDS)}")
        reason = obstacle(backend, device, dtype, head_size)
        if reason:
            raise ValueError(f"attention: back end {backend!r} cannot run: {reason}")
        if backend != "dense" or even:
            return backend
    reasons = {name: obstacle(name, device, dtype, head_size) for name in BACKENDS if name not in BY_NAME_ALONE}
    if not (even and _trusts_dense(device, head_size)):
        del reasons["dense"]
    elif not reasons["dense"]:
        reasons["dense"] = gradient_obstacle("dense", device, dtype, head_size)
    chosen = next(name for name, reason in reasons.items() if not reason)
    # Off CUDA all others lack the same, a CUDA device: the log need not say so.
    passed_over = reasons.items() if device.type == "cuda" else ()
    others = "; ".join(f"{name}: {reason}" for name, reason in passed_over if reason)
    which = ", equally long segments" if even else ""
    logger.info(
        "attention on %s in %s, heads of %d%s: %s%s",
        device,
        dtype,
        head_size,
        which,
        chosen,
        f" ({others})" if others else "",
    )
    return chosen


def _trusts_dense(device: torch.device, head_size: int) -> bool:
    """Tell whether `auto` takes `dense`: on Hopper, whose tensor cores cuDNN uses better than FlashAttention 2 does."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == 9
        and (torch.backends.cudnn.version() or 0) >= DENSE_CUDNN
        and head_size <= DENSE_HEAD
    )


@lru_cache(maxsize=16)
def gradient_obstacle(backend: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Return in a line why a back end's forward and backward are not to be used here, or None: see `try_gradients`."""
    # In a thread of its own: there autograd, the stream and modes are those of a fresh process, whoever asks; and an
    # error keeps no frame of the step's.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(try_gradients, BACKENDS[backend], BACKENDS["sdpa"], device, dtype, head_size).result()


def obstacle(backend: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Return in a line why a back end cannot run here, or None where it can."""
    counted = stands_for_gpu(device)
    if backend == "sdpa" or (backend == "dense" and device.type == "cpu" and not counted):
        return None
    if backend == "dense" and counted:
        return "torch computes it without its kernels where tensors stand for a GPU's"
    if counted:
        function = find_function(backend)
        return function if isinstance(function, str) else None
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if backend == "flash_attn_4" and capability[0] not in (9, 10, 11):
        return f"it needs compute capability 9 to 11, not {capability[0]}.{capability[1]}"
    if backend == "flash_attn_3" and capability[0] != 9:
        return f"it needs compute capability 9, not {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        return f"it needs compute capability 8.0, not {capability[0]}.{capability[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, not {dtype}"
    most = 128 if backend == "flash_attn_4" else 256
    if head_size % 8 or head_size > most:
        return f"it needs heads of a multiple of 8 up to {most}, not {head_size}"
    if backend == "dense":  # a part of torch
        return None
    function = find_function(backend)
    return function if isinstance(function, str) else None


@lru_cache(maxsize=8)
def find_function(backend: str) -> Callable[..., Any] | str:
    """Return the function of a back end, or in a line why there is none: its package is missing or does not load.

    A package may be there without the function: where only flash-attn 4 is installed, `flash_attn` is an empty
    namespace.
    """
    # In a thread of its own: a package that does not load may keep its exception for good, and with it the frames of
    # all callers. Asked for in a forward, these would hold the step's first activations (xformers 0.0.35 does so).
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_load_function, backend).result()


def _load_function(backend: str) -> Callable[..., Any] | str:
    try:
        if backend == "flash_attn_4":
            from flash_attn.cute import flash_attn_varlen_func as function
        elif backend == "flash_attn_3":
            from flash_attn_interface import flash_attn_varlen_func as function
        elif backend == "flash_attn_2":
            from flash_attn import flash_attn_varlen_func as function
        elif backend == "flash_attn_2_packed":
            from flash_attn import flash_attn_varlen_qkvpacked_func as function
        elif backend == "torch_varlen":
            from torch.nn.attention.varlen import varlen_attn as function
        else:
            from xformers.ops import memory_efficient_attention as function
    except Exception as error:  # a package built for another torch, CUDA or GPU may fail in any way
        return f"its function cannot be imported: {' '.join(f'{type(error).__name__}: {error}'.split())}"
    loaded: Callable[..., Any] = function
    return loaded


def _flash_attn(backend: str, q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, segments: Segments, causal: bool) -> Tensor:
    function = find_function(backend)
    assert not isinstance(function, str), function
    cu_queries, cu_keys = segments.cu_seqlens(q_THD.device)
    output = function(
        q_THD,
        k_SHD,
        v_SHD,
        cu_seqlens_q=cu_queries,
        cu_seqlens_k=cu_keys,
        max_seqlen_q=segments.longest_queries,
        max_seqlen_k=segments.longest_keys,
        causal=causal,
    )
    # flash-attn 4 and some versions of 3 return the log-sum-exp too.
    attended: Tensor = output[0] if isinstance(output, tuple) else output
    return attended


def _flash_attn_4(q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, segments: Segments, causal: bool) -> Tensor:
    return _flash_attn("flash_attn_4", q_THD, k_SHD, v_SHD, segments, causal)


def _flash_attn_3(q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, segments: Segments, causal: bool) -> Tensor:
    return _flash_attn("flash_attn_3", q_THD, k_SHD, v_SHD, segments, causal)


def _flash_attn_2(q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, segments: Segments, causal: bool) -> Tensor:
    if (
        side_by_side([q_THD.flatten(1), k_SHD.flatten(1), v_SHD.flatten(1)]) is None
        or segments.queries != segments.keys
    ):
        return _flash_attn("flash_attn_2", q_THD, k_SHD, v_SHD, segments, causal)
    # As one tensor: its backward then writes the three gradients side by side, where nobody need stack them.
    function = find_function("flash_attn_2_packed")
    assert not isinstance(function, str), function
    cu_queries, _ = segments.cu_seqlens(q_THD.device)
    packed_T3HD = _Packed.apply(q_THD, k_SHD, v_SHD)
    output: Tensor = function(packed_T3HD, cu_queries, segments.longest_queries, causal=causal)
    return output


class _Packed(torch.autograd.Function):
    """Views three tensors that lie side by side as one, and its gradient as three."""

    @staticmethod
    def forward(ctx: Any, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor) -> Tensor:
        tokens, heads, width = q_THD.shape
        row, _, _ = q_THD.stride()
        return q_THD.as_strided((tokens, 3, heads, width), (row, heads * width, width, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_T3HD: Tensor) -> tuple[Tensor, ...]:
        return gradient_T3HD.unbind(1)


def _torch_varlen(q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, segments: Segments, causal: bool) -> Tensor:
    function = find_function("torch_varlen")
    assert not isinstance(function, str), function
    keyword: dict[str, Any] = {"is_causal": causal}
    if _takes_window(function):
        keyword = {"window_size": (-1, 0) if causal else (-1, -1)}
    output: Tensor = function(
        q_THD,
        k_SHD,
        v_SHD,
        *segments.cu_seqlens(q_THD.device),
        segments.longest_queries,
        segments.longest_keys,
        **keyword,
    )
    return output


@lru_cache(maxsize=8)
def _takes_window(function: Callable[..., Any]) -> bool:
    """Tell how torch's function is asked for a causal mask: torch 2.10 by is_causal, later versions by a window."""
    return "window_size" in inspect.signature(function).parameters


def _xformers(q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, segments: Segments, causal: bool) -> Tensor:
    function = find_function("xformers")
    assert not isinstance(function, str), function
    mask = xformers_mask(segments, causal, q_THD.device)
    output: Tensor = function(q_THD[None], k_SHD[None], v_SHD[None], attn_bias=mask)
    return output[0]


def xformers_mask(segments: Segments, causal: bool, device: torch.device) -> Any:
    """Return xformers' block-diagonal mask of the segments; kept: each block of a tower asks for it."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    def make() -> Any:
        with torch.inference_mode(False):  # the mask is kept and serves later backward passes
            mask = BlockDiagonalMask.from_seqlens(list(segments.queries), list(segments.keys), device=device)
        return mask.make_causal() if causal else mask

    return segments.kept(("xformers", causal, device), make)


def _sdpa(q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, segments: Segments, causal: bool) -> Tensor:
    """Run each group as one batch: a view of the packed tokens where the segments are equally long, else padded."""
    lengths = [
        (segments.queries[group.first : group.first + group.size], segments.keys[group.first :][: group.size])
        for group in segments.groups
    ]
    query_tokens, key_tokens = [sum(pair[0]) for pair in lengths], [sum(pair[1]) for pair in lengths]
    parts = zip(q_THD.split(query_tokens), k_SHD.split(key_tokens), v_SHD.split(key_tokens), strict=True)
    outputs = []
    for group, (queries, keys), (q, k, v) in zip(segments.groups, lengths, parts, strict=True):
        if not group.queries:
            continue
        query_rows = mask = None
        if group.even_queries:
            q = q.unflatten(0, (group.size, group.queries))
        else:
            query_rows, _ = segments.padding(queries, group.queries, q.device)
            q = _pad(q, query_rows, group.size, group.queries)
        if group.even_keys:
            k, v = k.unflatten(0, (group.size, group.keys)), v.unflatten(0, (group.size, group.keys))
        else:
            key_rows, visible = segments.padding(keys, group.keys, k.device)
            k, v = _pad(k, key_rows, group.size, group.keys), _pad(v, key_rows, group.size, group.keys)
            # A causal query sees no key after its own place, so no padding: padding follows the segment's tokens.
            mask = None if causal else visible[:, None, None, :]
        output_BHLD = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=causal
        )
        output_THD = output_BHLD.transpose(1, 2).flatten(0, 1)
        outputs.append(output_THD if query_rows is None else output_THD.index_select(0, query_rows))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _dense(q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, segments: Segments, causal: bool) -> Tensor:
    """Run each run of equally long segments as one batch, a view of the packed tokens; nothing is padded."""
    query_tokens = [run.size * run.queries for run in segments.runs]
    key_tokens = [run.size * run.keys for run in segments.runs]
    parts = zip(q_THD.split(query_tokens), k_SHD.split(key_tokens), v_SHD.split(key_tokens), strict=True)
    outputs = []
    with _dense_kernels(q_THD.device):
        for run, (q, k, v) in zip(segments.runs, parts, strict=True):
            if run.queries:
                output_BHLD = functional.scaled_dot_product_attention(
                    q.unflatten(0, (run.size, run.queries)).transpose(1, 2),
                    k.unflatten(0, (run.size, run.keys)).transpose(1, 2),
                    v.unflatten(0, (run.size, run.keys)).transpose(1, 2),
                    is_causal=causal,
                )
                outputs.append(output_BHLD.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _dense_kernels(device: torch.device) -> AbstractContextManager[object]:
    """A context in which torch's dense attention on a GPU runs the first of DENSE_KERNELS that can, or raises."""
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    context: AbstractContextManager[object] = sdpa_kernel(
        [getattr(SDPBackend, name) for name in DENSE_KERNELS], set_priority=True
    )
    return context


# In the order of preference.
BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Segments, bool], Tensor]] = {
    "flash_attn_3": _flash_attn_3,
    "dense": _dense,
    "flash_attn_2": _flash_attn_2,
    "torch_varlen": _torch_varlen,
    "xformers": _xformers,
    "flash_attn_4": _flash_attn_4,
    "sdpa": _sdpa,
}
# Nobody has checked the gradients of flash-attn 4 with this project.
BY_NAME_ALONE = ("flash_attn_4",)


def _pad(x_THD: Tensor, rows_T: Tensor, count: int, length: int) -> Tensor:
    """Spread packed tokens to [count, length, H, D] with zeros between: masked keys and values must be finite too."""
    padded = x_THD.new_zeros(count * length, *x_THD.shape[1:]).index_copy(0, rows_T, x_THD)
    return padded.view(count, length, *x_THD.shape[1:])
