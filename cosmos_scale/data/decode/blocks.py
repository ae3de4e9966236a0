"""Tensors that lie in one block of memory, so that a batch gets from a worker to the training process without a copy.

A worker allocates the block in shared memory and fills it in place. Only the block's handle and layout go through the
queue, a few hundred bytes. One block a batch means one file handle, one mapping and, for a GPU, one copy into pinned
memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, a cache line; more than any dtype needs


class Field(NamedTuple):
    """One tensor of a block."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """The size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorBlock:
    """Tensors in one block. memory: [bytes] uint8. fields: the tensors, one after the other."""

    memory: Tensor
    fields: tuple[Field, ...]

    @classmethod
    def empty(cls, fields: Sequence[Field], *, shared: bool) -> "TensorBlock":
        """Allocate a block, in memory that other processes can map or in this process's own."""
        total = block_bytes(fields)
        if shared:
            # As torch's own collate does. `share_memory_` would copy memory that is not even written yet.
            storage = torch.UntypedStorage._new_shared(total)
            memory = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (total,))  # type: ignore[call-overload]
        else:
            memory = torch.empty(total, dtype=torch.uint8)
        return cls(memory, tuple(fields))

    @classmethod
    def of(cls, tensors: Sequence[Tensor], *, shared: bool) -> "TensorBlock":
        """Copy tensors into a new block."""
        block = cls.empty([Field(tuple(tensor.shape), tensor.dtype) for tensor in tensors], shared=shared)
        for place, tensor in zip(block.tensors(), tensors, strict=True):
            place.copy_(tensor)
        return block

    def tensors(self) -> list[Tensor]:
        """The tensors, which share the block's memory."""
        found, start = [], 0
        for field in self.fields:
            found.append(self.memory[start : start + field.bytes].view(field.dtype).view(field.shape))
            start += _aligned(field.bytes)
        return found

    def pin_memory(self) -> "TensorBlock":
        """Copy the block into memory from which a GPU copies by itself."""
        return replace(self, memory=self.memory.pin_memory())


def block_bytes(fields: Sequence[Field]) -> int:
    """The size of a block of such tensors."""
    return sum(_aligned(field.bytes) for field in fields)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
