"""The copy in memory from which a checkpoint is written: one flat buffer for each kind of tensor, made once.

The buffers are in the order of the files. Neighbours in live memory, as the parameters of a flat shard are, are copied
at once. From a GPU the copies run in a stream of their own, into memory that is locked in its pages: the host waits for
none of them, and the GPU's next update waits until they are done.
"""

import logging
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from cosmos_scale.checkpoint.state import KINDS
from cosmos_scale.fragments import Fragment

_LOG = logging.getLogger(__name__)


class Snapshot:
    """A copy of a rank's fragments: 16 bytes for each of their elements.

    buffers: by kind, [elements] float32 each. tensors: views of the buffers, by their names in a file and in the file's
    order. copies: what `take` does, (part of a buffer, live memory), [n] float32 each.
    """

    def __init__(self, fragments: Sequence[Fragment], *, on_gpu: bool) -> None:
        """Allocate the buffers and touch each page: a first touch in `take` would take as long as the copy."""
        self._fragments = list(fragments)
        self._on_gpu = on_gpu
        self.buffers = {kind: _pages(sum(part.weight.numel() for part in self._fragments)) for kind in KINDS}
        self.tensors: dict[str, Tensor] = {}
        self.copies: list[tuple[Tensor, Tensor]] = []
        for kind, buffer in self.buffers.items():
            parts = buffer.split([part.weight.numel() for part in self._fragments])
            self.tensors |= {f"{part.name}|{kind}": own for part, own in zip(self._fragments, parts, strict=True)}
            self.copies += _joined([part.tensors()[kind] for part in self._fragments], buffer)
        self._locked: list[Tensor] = []
        if on_gpu:
            device = self._fragments[0].weight.device
            self._locked = [buffer for buffer in self.buffers.values() if _lock(buffer, device)]
            self._stream = torch.cuda.Stream(device)
            self._taken = torch.cuda.Event()

    def take(self) -> None:
        """Copy what the fragments hold now; on a GPU, after all that its current stream holds."""
        if not self._on_gpu:
            for target, source in self.copies:
                target.copy_(source)
            return
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for target, source in self.copies:
                target.copy_(source, non_blocking=True)
            self._taken.record(self._stream)
        current.wait_event(self._taken)  # else the next update would change what is being copied

    def wait(self) -> None:
        """Wait until the last copy is whole."""
        if self._on_gpu:
            self._taken.synchronize()

    def free(self) -> None:
        """Give the memory back, when the last copy is whole and nobody reads it any more."""
        for buffer in self._locked:
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
        self.tensors, self.copies, self.buffers, self._locked = {}, [], {}, []


def _pages(elements: int) -> Tensor:
    """Return [elements] float32 of zeros in pages of their own, all of them touched."""
    if not elements:
        return torch.zeros(0)
    # Not torch's pinned memory, which takes the next power of two. Shared with forked loader processes: else each page
    # would be copied before the first write behind a fork. The pages go back as soon as nobody holds them.
    pages: Tensor = torch.frombuffer(mmap.mmap(-1, 4 * elements), dtype=torch.float32)
    return pages.fill_(0.0)


def _lock(buffer: Tensor, device: torch.device) -> bool:
    """Lock a buffer in its pages, so that copies from a GPU run beside the host; return whether it could be."""
    error = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
    if not int(error):
        return True
    _LOG.warning("checkpoints: %d bytes cannot be locked in memory (%s): saving stalls longer", buffer.nbytes, error)
    with suppress(RuntimeError):  # CUDA keeps the error for whoever asks next: torch does, at each kernel's launch
        torch.zeros(1, device=device).add_(1.0)
    return False


def _joined(sources: Sequence[Tensor], buffer: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pair each run of sources that follow each other in one memory with its part of a buffer."""
    runs: list[list[Tensor]] = []
    for source in sources:
        last = runs[-1][-1] if runs else None
        follows = last is not None and (
            source.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
            and source.storage_offset() == last.storage_offset() + last.numel()
        )
        if follows:
            runs[-1].append(source)
        else:
            runs.append([source])
    sizes = [sum(source.numel() for source in run) for run in runs]
    return [
        (part, run[0].as_strided((size,), (1,)))
        for part, run, size in zip(buffer.split(sizes), runs, sizes, strict=True)
    ]
