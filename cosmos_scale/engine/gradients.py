"""Gradients averaged over the ranks during the backward: a bucket at a time, each rank keeps its shard of the average.

A bucket is one flat group of the optimizer. As soon as all of its gradients are there, they are copied into one flat
buffer by one launch, and given up. Where there are other ranks, the buffer is reduce-scattered while the backward goes
on: torch's collectives run in a stream of their own on a GPU, and in a thread on a CPU.

What is rounded: the buffer that travels has the dtype of the traffic, and the sum over the ranks is taken in it. The
sum is divided by the number of ranks afterwards, in float32. Micro-batches add up in float32.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from cosmos_scale.engine.ranks import Ranks
from cosmos_scale.loss.gather import reduce_scatter_flat
from cosmos_scale.phases import phase

SMALL = 8  # a small group has this part of another group's elements
MOST_IN_FLIGHT = 2  # buckets reduced at one time: more would hold more memory, and no less time would be left


def cut_groups(groups: Sequence[dict[str, Any]], most: int, last: Sequence[nn.Parameter] = ()) -> list[dict[str, Any]]:
    """Cut each of an optimizer's groups into groups that end as soon as they have `most` elements; options are kept.

    last: parameters whose gradients the backward forms after all others, the first of them at the very end. In a group
    that is cut they come behind the others, in groups of their own. The first of these groups is small, since it is the
    last to be full: by then the backward is over and hides nothing of the group's traffic.
    """
    latest = {id(parameter) for parameter in last}
    cut = []
    for group in groups:
        parts = [group["params"]]
        if sum(parameter.numel() for parameter in group["params"]) >= most:
            early = [parameter for parameter in group["params"] if id(parameter) not in latest]
            late = [parameter for parameter in group["params"] if id(parameter) in latest]
            parts = [*_cut(early, most, most), *_cut(late, most // SMALL, most)]
        cut += [{**group, "params": part} for part in parts]
    return cut


def _cut(parameters: Sequence[nn.Parameter], first: int, others: int) -> list[list[nn.Parameter]]:
    """Cut a list into parts that end as soon as they have so many elements; a small rest joins the part before it."""
    parts: list[list[nn.Parameter]] = []
    elements, limit = 0, first
    for parameter in parameters:
        if not parts or elements >= limit:
            limit = others if parts else first
            parts.append([])
            elements = 0
        parts[-1].append(parameter)
        elements += parameter.numel()
    if len(parts) > 1 and elements < others // SMALL:
        rest = parts.pop()
        parts[-1] += rest
    return parts


class GradientBuckets:
    """Takes the gradients of parameters out of backwards, and returns this rank's shards of their average.

    All ranks have the same buckets and the same backwards. A parameter without a gradient on a rank counts as a
    gradient of zero there.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[nn.Parameter]],
        sizes: Sequence[int],
        ranks: Ranks,
        *,
        traffic: torch.dtype,
        accumulates_whole: bool,
    ) -> None:
        """groups: the parameters of each bucket, in the order in which they lie in its flat tensor, without gaps.

        sizes: elements of each flat tensor, with padding at its end; divisible by the number of ranks.
        accumulates_whole: whether micro-batches add up before the ranks do: less traffic, and whole gradients in
        memory. Otherwise each backward's gradients are reduced, and shards add up.
        """
        self._ranks = ranks
        self._accumulates_whole = accumulates_whole
        self._buckets = [_Bucket(group, size, ranks.world_size) for group, size in zip(groups, sizes, strict=True)]
        self._traffic = traffic if ranks.world_size > 1 else torch.float32
        self._order: list[int] | None = None  # in which all ranks send their buckets
        self._filled: list[int] = []  # the buckets of this backward, in the order in which they filled up
        self._due: deque[_Bucket] = deque()  # buckets that this backward is still to send
        self._in_flight: deque[_Bucket] = deque()
        self._open = False
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._hook(number))

    @contextmanager
    def taken(self, *, last: bool) -> Iterator[list[Tensor]]:
        """Take the gradients of the backward inside. Collective, except where whole gradients go on adding up.

        last: whether this is the update's last micro-batch. Yields a list, which in the last one holds the shards after
        the backward: float32, one for each bucket, the average over ranks of the sum over the update's backwards.
        """
        reduces = last or not self._accumulates_whole
        for bucket in self._buckets:
            bucket.begin(self._traffic if reduces else torch.float32)
        self._filled.clear()
        if reduces and self._order is not None:
            self._due.extend(self._buckets[number] for number in self._order)
        shards: list[Tensor] = []
        self._open = True
        try:
            yield shards
        finally:
            self._open = False
        for bucket in self._buckets:
            bucket.take()
        if reduces:
            self._reduce_the_rest()
        if last:
            shards += [bucket.give() for bucket in self._buckets]
            if self._ranks.world_size > 1:
                torch._foreach_mul_(shards, 1.0 / self._ranks.world_size)

    def _hook(self, number: int) -> Callable[[Tensor], None]:
        bucket = self._buckets[number]

        def arrived(parameter: Tensor) -> None:
            if self._open and bucket.notice(parameter):
                bucket.take()
                self._filled.append(number)
                # Every rank sends in the same order. So a bucket may wait for one that fills up later.
                while self._due and self._due[0].is_taken:
                    self._send(self._due.popleft())

        return arrived

    def _reduce_the_rest(self) -> None:
        if self._order is None:  # the first time: nothing was sent during the backward
            self._order = self._agreed_order()
            self._due.extend(self._buckets[number] for number in self._order)
        while self._due:
            self._send(self._due.popleft())
        while self._in_flight:
            self._in_flight.popleft().receive()

    def _agreed_order(self) -> list[int]:
        """Return the order in which the first rank's buckets filled up; those that did not come last. Collective."""
        rest = [number for number in range(len(self._buckets)) if number not in self._filled]
        order = torch.tensor(self._filled + rest, device=self._ranks.device)
        if self._ranks.world_size > 1:
            dist.broadcast(order, 0)
        agreed: list[int] = order.tolist()
        return agreed

    def _send(self, bucket: "_Bucket") -> None:
        if len(self._in_flight) == MOST_IN_FLIGHT:
            self._in_flight.popleft().receive()
        bucket.send(self._traffic)
        self._in_flight.append(bucket)


class _Bucket:
    """The parameters of one flat group, and where their gradients are: with them, in a buffer, on the way, or reduced.

    buffer: the whole bucket's gradients of this rank, flat; None before any, and after they were received.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], size: int, world_size: int) -> None:
        self.parameters = list(parameters)
        self.buffer: Tensor | None = None
        self.is_taken = False
        self._size = size
        self._used = sum(parameter.numel() for parameter in parameters)
        self._share = size // world_size
        self._everyone = {id(parameter) for parameter in parameters}
        self._awaited: set[int] = set()
        self._dtype = torch.float32
        self._on_the_way: tuple[Any, Tensor] | None = None  # the collective, and what it fills
        self._shard: Tensor | None = None  # the sum over ranks so far

    def begin(self, dtype: torch.dtype) -> None:
        """Expect a gradient for each parameter. dtype: of a new buffer."""
        self._awaited, self.is_taken, self._dtype = set(self._everyone), False, dtype

    def notice(self, parameter: Tensor) -> bool:
        """Note that a parameter has its gradient; return whether all have theirs."""
        # The recomputation of blocks may run a backward inside the backward, so that a parameter which is used inside
        # and outside of blocks gets its gradient in two parts. No parameter of the model is.
        assert not self.is_taken, f"another gradient for a parameter of {tuple(parameter.shape)} after its bucket left"
        self._awaited.discard(id(parameter))
        return not self._awaited

    def take(self) -> None:
        """Move the gradients that are there into the buffer, once a backward."""
        if self.is_taken:
            return
        self.is_taken = True
        is_new = self.buffer is None
        if self.buffer is None:
            self.buffer = torch.empty(self._size, dtype=self._dtype, device=self.parameters[0].device)
            if self._used < self._size:
                self.buffer[self._used :].zero_()
        places, gradients, empty = [], [], []
        for place, parameter in zip(
            _unflatten_dense_tensors(self.buffer, self.parameters), self.parameters, strict=True
        ):
            if parameter.grad is None:
                empty.append(place)
            else:
                places.append(place)
                gradients.append(parameter.grad)
                parameter.grad = None
        if gradients:
            (torch._foreach_copy_ if is_new else torch._foreach_add_)(places, gradients)
        if empty and is_new:
            torch._foreach_zero_(empty)

    def send(self, traffic: torch.dtype) -> None:
        """Start to sum the buffers of all ranks, in a dtype. Collective."""
        assert self.buffer is not None
        if self._share == self._size:
            self._on_the_way = (None, self.buffer)
            return
        self.buffer = self.buffer.to(traffic)
        share = self.buffer.new_empty(self._share)
        self._on_the_way = (reduce_scatter_flat(share, self.buffer, async_op=True), share)

    def receive(self) -> None:
        """Wait until the sum is there, and add it to the shard."""
        assert self._on_the_way is not None
        work, share = self._on_the_way
        if work is not None:
            with phase("reduction"):
                work.wait()
        self._on_the_way = self.buffer = None
        self._shard = share.float() if self._shard is None else self._shard.add_(share)

    def give(self) -> Tensor:
        """Return the shard, and forget it."""
        assert self._shard is not None
        shard, self._shard = self._shard, None
        return shard
