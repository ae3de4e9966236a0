"""How torch's allocator keeps a GPU's memory."""

import os

import torch

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def use_expandable_segments() -> bool:
    """Let the allocator's segments grow, unless a variable of VARIABLES is set; return whether they may grow now.

    Batches hold other numbers of tokens at each step. Segments that cannot grow would leave holes behind them. To be
    called before the first tensor on a GPU.
    """
    if any(os.environ.get(name) for name in VARIABLES):
        return False
    newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # torch 2.9 and later
    change = newer or torch.cuda.memory._set_allocator_settings
    change("expandable_segments:True")
    return True
