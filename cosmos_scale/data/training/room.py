"""Whether the batches that loader processes hold ready fit into the memory of the host."""

import os
import resource
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.errors import UserError
from cosmos_scale.host import free_memory, shared_memory_obstacle
from cosmos_scale.words import counted

SHARED_MEMORY = Path("/dev/shm")
GIB = 2**30


class ReadyBatches(NamedTuple):
    """The batches in the shared memory of one host: `prefetch` of each worker of each rank, of `nbytes` each."""

    ranks: int
    workers: int
    prefetch: int
    nbytes: int

    @property
    def total(self) -> int:
        """The bytes of all batches."""
        return self.ranks * self.workers * self.prefetch * self.nbytes

    def describe(self) -> str:
        """Say how many batches there are, and how large."""
        if not self.workers:
            return "none: the training process loads its batches itself"
        ranks = f"{self.ranks} ranks x " if self.ranks > 1 else ""
        made = f"{counted(self.workers, 'worker')} x {counted(self.prefetch, 'batch', 'batches')}"
        return f"{ranks}{made} of {self.nbytes / 2**20:,.1f} MiB, {self.total / GIB:,.3f} GiB"

    def check_shared_memory(self) -> None:
        """Raise UserError where there is no shared memory to write to, where it is smaller than all batches, or a batch
        larger than files may be: a worker would die.
        """
        if self.workers and (obstacle := shared_memory_obstacle()):
            raise UserError(
                f"{SHARED_MEMORY}: cannot be written to: {obstacle}; rule: loader processes share it, so mount one "
                "that can (docker run --shm-size), or set data.workers: 0"
            )
        largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if self.workers and largest != resource.RLIM_INFINITY and largest < self.nbytes:
            raise UserError(
                f"a ready batch takes a file of {self.nbytes / 2**20:,.1f} MiB in shared memory, but files may have "
                f"{largest / 2**20:,.1f} MiB; rule: raise the limit (ulimit -f unlimited), or set data.workers: 0"
            )
        if not SHARED_MEMORY.is_dir():
            return
        system = os.statvfs(SHARED_MEMORY)
        size = system.f_blocks * system.f_frsize  # 0: no limit
        if 0 < size < self.total:
            raise UserError(
                f"{self._needed()}, but {SHARED_MEMORY} has {size / GIB:.1f}; rule: lower data.prefetch or "
                "data.workers, or enlarge it (docker run --shm-size)"
            )

    def check_host(self) -> int:
        """Return the bytes that the host has left for them; raises UserError where that is too little."""
        free = free_memory()
        if free < self.total:
            raise UserError(
                f"{self._needed()}, but this host, or the limit of its container, has {free / GIB:.1f} left; rule: "
                "lower data.prefetch or data.workers"
            )
        return free

    def _needed(self) -> str:
        return (
            f"data.prefetch: {counted(self.prefetch, 'batch', 'batches')} ready in each worker ({self.workers} a rank, "
            f"{counted(self.ranks, 'rank')}) take {self.total / GIB:.1f} GiB"
        )
