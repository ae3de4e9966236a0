"""The exact GELU in pieces: torch's own bits, few sizes, and memory that does not grow with the sizes it has seen."""

import ctypes
import gc

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cosmos_scale.kernels.gelu_in_pieces import SMALLEST_PIECE, gelu_in_pieces, piece_sizes
from tests.model.models import SMALL, initialised, small_batch

SIZES_LIMIT = 24
"""All sizes of pieces of up to a million rows: 7 rests, and the powers of two from 2^3 to 2^19."""


class HeapCounts(ctypes.Structure):
    """glibc's struct mallinfo2, in bytes and counts of the whole process."""

    _fields_ = [
        *[(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")],
        *[(name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")],
    ]


def bytes_in_use() -> int:
    """Return what this process has asked the C library's heap for and not given back."""
    gc.collect()
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("this C library does not count its heap (glibc 2.33 and later do)")
    library.mallinfo2.restype = HeapCounts
    counts = library.mallinfo2()
    return int(counts.uordblks + counts.hblkhd)


def problem(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x, upstream = (torch.randn(rows, width, generator=generator) for _ in range(2))
    return (3 * x).to(dtype), upstream.to(dtype)  # the tails too


def with_gradient(function: object, x: Tensor, upstream: Tensor) -> list[Tensor]:
    assert callable(function)
    leaf = x.clone().requires_grad_()
    active: Tensor = function(leaf)
    return [active.detach(), *torch.autograd.grad(active, leaf, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [20, 512])
def test_value_and_gradient_have_the_bits_of_torchs_own(dtype: torch.dtype, width: int) -> None:
    for rows in (0, 1, 2, SMALLEST_PIECE - 1, SMALLEST_PIECE, 63, 64, 65, 999, 2048):
        given = problem(rows, width, dtype)
        ours, theirs = with_gradient(gelu_in_pieces, *given), with_gradient(functional.gelu, *given)
        for mine, oracle in zip(ours, theirs, strict=True):
            assert mine.dtype == dtype
            assert torch.equal(mine, oracle), rows


def test_rows_that_are_not_contiguous_go_torchs_own_way() -> None:
    x, upstream = problem(40, 16, torch.float32)
    ours, theirs = (with_gradient(one, x.t(), upstream.t()) for one in (gelu_in_pieces, functional.gelu))
    assert all(map(torch.equal, ours, theirs))


def test_a_steady_number_of_rows_is_one_piece() -> None:
    x, _ = problem(40, 16, torch.float32)
    names = [str(gelu_in_pieces(x.requires_grad_(), steady=steady).grad_fn) for steady in (True, False)]
    assert [name.startswith("<Gelu") for name in names] == [True, False]


def test_all_numbers_of_rows_come_to_few_sizes() -> None:
    seen: set[int] = set()
    for rows in (*range(5000), 2**20 - 1):
        sizes = piece_sizes(rows)
        assert sum(sizes) == rows
        assert sizes == sorted(sizes, reverse=True)
        seen.update(sizes)
    assert len(seen) == SIZES_LIMIT


def test_a_whole_without_gradient_keeps_nothing() -> None:
    x, _ = problem(70, 8, torch.float32)
    assert gelu_in_pieces(x).grad_fn is None
    with torch.inference_mode():
        assert torch.equal(gelu_in_pieces(x), functional.gelu(x))


def test_memory_does_not_grow_with_the_numbers_of_tokens_that_a_model_has_seen() -> None:
    """68 numbers of caption tokens, forward and backward: torch's own GELU keeps 3.7 MiB of them, the pieces 56 KiB."""
    text = SMALL.text.model_copy(update={"layers": 2})  # of the last block few tokens are read, always as many
    model = initialised(SMALL.model_copy(update={"text": text}))

    def pass_with(samples: int, seed: int) -> int:
        batch = small_batch(samples, seed=seed)
        features = model(batch)
        torch.stack([features.image.sum(), features.text.sum(), features.text_crossmodal.sum()]).sum().backward()
        return int(batch.caption_lengths.sum())

    for rows in (*range(1, 8), 8, 16, 32, 64, 128, 256):  # all pieces that the texts come to
        with_gradient(gelu_in_pieces, *problem(rows, 4 * text.width, torch.float32))
    for seed in range(12):
        pass_with(4 + seed % 6, seed)
    before = bytes_in_use()
    tokens = {pass_with(4 + seed % 6, seed) for seed in range(12, 100)}
    assert len(tokens) > 50, "the texts do not differ enough to tell"
    assert bytes_in_use() - before < 2**19
