"""The teacher's image tower as a CUDA graph: one launch a step in place of some hundred.

The tower takes crops of the same number and size at every step, keeps no graph for a backward, and its weights stay
where they are: an update of the average is copied into them. So what the GPU was told once can be replayed.
"""

import logging
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

WARM_UP = 3  # calls that run as always: they compile kernels, and fill the caches of lengths and plans

_LOG = logging.getLogger(__name__)


class GraphedEncoder:
    """Encodes images as a function does; from the call after WARM_UP on by a CUDA graph.

    Images of another shape or dtype than the graph's go to the function itself, and all do where no graph can be made:
    that is said once. Needs a GPU.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        """encode: launches the same work for images of one shape, on weights that stay in their memory."""
        self._encode = encode
        self._kind: tuple[torch.Size, torch.dtype] | None = None  # of the images of the last calls, then of the graph
        self._calls = 0
        self._replay: Callable[[], object] | None = None
        self._failed = False

    @property
    def replays(self) -> bool:
        """Whether a graph has been made."""
        return self._replay is not None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of images; they are the caller's own."""
        kind = (images.shape, images.dtype)
        if self._replay is None and not self._failed:
            self._calls, self._kind = self._calls + 1 if kind == self._kind else 1, kind
            if self._calls > WARM_UP:
                self._capture(images)
        if self._replay is None or kind != self._kind:
            return self._encode(images)
        self._images.copy_(images)
        self._replay()
        return self._features.clone()  # the next replay writes to the same memory

    def _capture(self, images: Tensor) -> None:
        self._images = images.clone()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream(images.device)
        try:
            # Other threads may pin memory meanwhile, and NCCL's asks for its events.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._features = self._encode(self._images)
        except RuntimeError as error:
            self._failed = True
            # Where the capture itself is broken, torch (2.14) cannot end it: its stream would stay the current one, and
            # the allocator would wait for the capture's end before it reuses any memory that two streams have used.
            torch.cuda.set_stream(current)
            with suppress(RuntimeError):  # of a capture that was ended
                torch._C._cuda_endAllocateToPool(images.device.index, pool)
            _LOG.info(
                "teacher: no CUDA graph of the image tower, each kernel is launched: %s", str(error).split("\n")[0]
            )
            return
        self._replay = graph.replay
        _LOG.info("teacher: the image tower is replayed as a CUDA graph, for images of %s", list(images.shape))
