"""Tables that lead the programs of one Triton launch to many tensors.

A shard is some tensors of equal sizes: a weight, its gradient, its moments. A table on the device says where the
tensors of each shard of a list lie. Each program of a launch takes a block of elements of one shard, and finds the
shard in the table.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos_scale.kernels.segments import to_device

# Rows of a table before its addresses: a shard's first program and its elements.
FIRST_PROGRAM, ELEMENTS, ADDRESSES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NO_PROGRAM = 2**62  # first program of columns that hold no shard
ALIGNMENT = 16  # bytes; wider accesses need it
POINTED = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def find_shard(table, SHARDS: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's shard, its first element's place in the shard, and the shard's elements."""
    program = tl.program_id(0)
    columns = tl.arange(0, SHARDS)
    first_programs = tl.load(table + FIRST_PROGRAM * SHARDS + columns)
    shard = tl.sum((first_programs <= program).to(tl.int32), 0) - 1
    start = (program - tl.load(table + FIRST_PROGRAM * SHARDS + shard)) * BLOCK
    return shard, start, tl.load(table + ELEMENTS * SHARDS + shard)


@triton.jit
def find_tensor(table, row, shard, SHARDS: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer to the first element of a shard's tensor; row: which of its tensors."""
    pointer = tl.load(table + (ADDRESSES + row) * SHARDS + shard).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


def programs(sizes: Sequence[int], block: int) -> int:
    """Return how many programs shards of these sizes take, each in blocks of its own; an empty shard takes one too."""
    return sum(max(1, -(-size // block)) for size in sizes)


def are_aligned(lists: Sequence[Sequence[Tensor]]) -> bool:
    """Tell whether every tensor begins where wide accesses may begin."""
    return all(tensor.data_ptr() % ALIGNMENT == 0 for tensors in lists for tensor in tensors)


def table_of(lists: Sequence[Sequence[Tensor]], block: int, steps: Sequence[Tensor] = ()) -> Tensor:
    """Return the table of shards on their device: [ADDRESSES + lists, with steps one more, columns] int64.

    lists: of the shards' tensors, in order. block: elements of a program. Tables are kept, since the same addresses
    come again. Raises ValueError on tensors that the kernels cannot take.
    """
    first = lists[0]
    sizes = tuple(tensor.numel() for tensor in first)
    for tensors in lists:
        if tensors and tuple(tensor.numel() for tensor in tensors) != sizes:
            raise ValueError(f"lists of {[tensor.numel() for tensor in tensors]} and {list(sizes)} elements must agree")
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise ValueError("shards must be contiguous")
    addresses = tuple(
        tuple(tensor.data_ptr() for tensor in tensors) if tensors else (0,) * len(sizes)
        for tensors in (*lists, *([steps] if steps else []))
    )
    return _table(sizes, addresses, block, first[0].device)


@lru_cache(maxsize=64)
def _table(sizes: tuple[int, ...], addresses: tuple[tuple[int, ...], ...], block: int, device: torch.device) -> Tensor:
    first_programs = [programs(sizes[:number], block) for number in range(len(sizes))]
    padding = triton.next_power_of_2(len(sizes)) - len(sizes)
    rows = [[*first_programs, *[NO_PROGRAM] * padding]]
    rows += [[*row, *[0] * padding] for row in (sizes, *addresses)]
    return to_device(np.array(rows, dtype=np.int64), device)
