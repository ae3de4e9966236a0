"""What a caller has told torch for all of a process: none of it may change or break what a loaded model computes."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

# OpenMP's threads of the process are not there in one that is forked off it: a computation on several would wait for
# them for ever. torch's own loaders start their workers so too.
os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


@contextmanager
def usual_torch() -> Iterator[None]:
    """Compute in this block, or in a function, in float32 and on the CPU unless told, whatever the caller has set.

    Such as torch.set_default_dtype, torch.set_default_device and torch.autocast; all hold again afterwards.
    """
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        if before != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, before)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
