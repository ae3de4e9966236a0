"""The collectives of a step, noted as their operators are called."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cosmos_scale.profiling.operators import PhasedMode

_KINDS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "broadcast": "broadcast",
}


class Collective(NamedTuple):
    """One collective.

    phase: where it ran. kind: all_reduce, all_gather, reduce_scatter or broadcast. dtype, elements: of the largest
    tensor that it is handed: the whole one, not a rank's share.
    """

    phase: str
    kind: str
    dtype: torch.dtype
    elements: int

    @property
    def nbytes(self) -> int:
        """Bytes of the largest tensor."""
        return self.elements * self.dtype.itemsize

    def bytes_received(self, world_size: int) -> float:
        """Return the bytes that a rank receives where ranks form a ring."""
        share = (world_size - 1) / world_size
        return self.nbytes * {"all_reduce": 2 * share, "broadcast": 1.0}.get(self.kind, share)


class CollectiveCounter(PhasedMode):
    """Notes every collective that runs inside it. A context manager. seen: in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Collective] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        found = collective_of(func, args, self._phase)
        if found is not None:
            self.seen.append(found)
        return func(*args, **(kwargs or {}))


def collective_of(func: Callable[..., object], args: tuple[object, ...], phase: str) -> Collective | None:
    """Return the collective that an operator of torch is, or None."""
    namespace, _, name = str(func).partition(".")
    kind = _KINDS.get(name.partition(".")[0].removesuffix("_"))
    if namespace != "c10d" or kind is None:
        return None
    flat = [item for argument in args for item in _tensors(argument)]
    largest = max(flat, key=lambda tensor: tensor.numel())
    return Collective(phase, kind, largest.dtype, largest.numel())


def _tensors(argument: object) -> Iterator[Tensor]:
    """Yield the tensors of an argument, which may be a list of lists of them."""
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from _tensors(item)
