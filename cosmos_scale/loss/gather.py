"""The loss's collectives: what one rank's rows need of the other ranks, and nothing else.

A step has five, whatever the number of views: one all-gather of the column features, two all-reduces of column
statistics, one reduce-scatter of the gathered student columns' gradients, one all-reduce of a few scalars. Where
columns are taken a part at a time, each part has two all-reduces and a reduce-scatter of its own. With one rank there
are none.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

# torch 2.14 renamed these two functions and warns of their old names, which older versions need.
all_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class BatchRanks:
    """The ranks that share a global batch; rank r holds its samples r*B to (r+1)*B - 1.

    group: None is the default process group, or this process alone where torch.distributed is not initialised.
    Every method must be called by all ranks, in the same order, with the same shapes.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        distributed = group is not None or dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if distributed else 0
        self.size = dist.get_world_size(group) if distributed else 1

    def gather_columns(self, views: Sequence[Tensor]) -> Tensor:
        """Gather each view's features of every rank in one all-gather.

        views: T tensors [B, E]. Returns [W, T, B, E] in the views' widest dtype.
        """
        dtype = views[0].dtype
        for view in views[1:]:
            dtype = torch.promote_types(dtype, view.dtype)
        local_TBE = torch.stack([view.to(dtype) for view in views])
        if self.size == 1:
            return local_TBE.unsqueeze(0)
        gathered_WTBE = local_TBE.new_empty(self.size, *local_TBE.shape)
        all_gather_flat(gathered_WTBE.view(-1), local_TBE.view(-1), group=self.group)
        return gathered_WTBE

    def combine_columns(self, logsumexps: Sequence[Tensor]) -> list[Tensor]:
        """Combine the columns' statistics of all ranks.

        logsumexps: of each column's logits over this rank's rows. Returns the same over all ranks' rows.
        """
        if self.size == 1:
            return list(logsumexps)
        own = torch.cat([tensor.flatten() for tensor in logsumexps])
        largest = own.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        total = own.sub_(largest).exp_()
        dist.all_reduce(total, dist.ReduceOp.SUM, group=self.group)
        combined = largest.add_(total.log_()).split([tensor.numel() for tensor in logsumexps])
        return [part.view(tensor.shape) for part, tensor in zip(combined, logsumexps, strict=True)]

    def scatter_column_gradients(self, gradients_TGE: Tensor) -> Tensor:
        """Sum the gradients of columns over ranks and return this rank's own columns' [T, b, E].

        gradients: [T, W * b, E], of the same b samples of every rank, in rank order.
        """
        if self.size == 1:
            return gradients_TGE
        by_rank_WTbE = gradients_TGE.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
        own_TbE = torch.empty_like(by_rank_WTbE[0])
        reduce_scatter_flat(own_TbE.view(-1), by_rank_WTbE.view(-1), group=self.group)
        return own_TbE

    def add(self, scalars: Tensor) -> Tensor:
        """Add a tensor over ranks, in place; the result is the same on all ranks, bit for bit."""
        if self.size > 1:
            dist.all_reduce(scalars, dist.ReduceOp.SUM, group=self.group)
        return scalars
