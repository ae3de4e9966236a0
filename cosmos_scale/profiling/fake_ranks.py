"""One process that plays a rank of many: torch's fake process group takes every collective and moves nothing.

So the trainer's own code can be counted and timed at any number of ranks. Shapes, dtypes and the calls are real. Values
are not: what a collective should have received is whatever its memory held.
"""

import logging
import os

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from cosmos_scale.engine.comm_build import use_own_environment
from cosmos_scale.engine.contact import Contact
from cosmos_scale.engine.ranks import Ranks, choose_device


def start_fake_ranks(world_size: int, rank: int = 0) -> Ranks:
    """Become one of so many ranks on CPUs, for the rest of this process; a process group before this one is left."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    use_own_environment()
    choose_device("cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
    logging.disable(logging.WARNING)  # DeepSpeed sets the level of its messages when it is imported
    control = dist.group.WORLD
    assert control is not None
    return Ranks(rank=rank, world_size=world_size, device=torch.device("cpu"), control=control, contact=Contact(0, {}))
