"""Where the project's Triton kernels serve, and which tensors stand for a GPU's where steps are counted without one."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

# Kinds of devices whose tensors stand for a GPU's. Nothing computes with such tensors: steps are counted with them.
_stand_ins = {"meta"}


def like_gpu(device: torch.device) -> bool:
    """Tell whether what runs on a device is what a GPU would run: on a GPU, or where tensors stand for a GPU's."""
    return device.type == "cuda" or stands_for_gpu(device)


def stands_for_gpu(device: torch.device) -> bool:
    """Tell whether a device's tensors stand for a GPU's: those of "meta" always do."""
    return device.type in _stand_ins


@contextmanager
def cpu_stands_for_gpu() -> Iterator[None]:
    """Let tensors on the CPU stand for a GPU's: inside, nothing may really run the kernels that are chosen."""
    _stand_ins.add("cpu")
    try:
        yield
    finally:
        _stand_ins.discard("cpu")


def serves(tensor: Tensor) -> bool:
    """Tell whether the Triton kernels serve a tensor: of low precision, on a GPU or where a tensor stands for a GPU's.

    A compiler writes kernels of its own: nothing of ours serves what is being compiled.
    """
    low = tensor.dtype in (torch.bfloat16, torch.float16)
    return low and not torch.compiler.is_compiling() and like_gpu(tensor.device) and has_triton()


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Tell whether triton is installed: it comes with torch's builds for GPUs."""
    return importlib.util.find_spec("triton") is not None
