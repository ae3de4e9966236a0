"""Where the project's Triton kernels serve."""

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor


def serves(tensor: Tensor) -> bool:
    """Tell whether the Triton kernels serve a tensor: of low precision, on a GPU or on "meta", where steps are counted.

    A compiler writes kernels of its own: nothing of ours serves what is being compiled.
    """
    low = tensor.dtype in (torch.bfloat16, torch.float16)
    return low and (tensor.is_cuda or tensor.is_meta) and not torch.compiler.is_compiling() and _has_triton()


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
