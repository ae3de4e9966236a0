"""Float32 values of parameters that a lower precision would hurt, read from masters and averages, whole on every rank.

These are the log-scales of the student, and where the compute precision is low the norms' gains and offsets of student
and teacher: a gain near 1 has steps of 2^-7 in bf16, so that small updates would not move what the forward reads. They
are 0.05 % of ViT-B/16's parameters.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_scale.engine.ranks import Ranks
from cosmos_scale.fragments import Fragment
from cosmos_scale.loss.gather import all_gather_flat


class FullValues:
    """Values of some masters and of some averages, by parameter name: flat, float32, on the ranks' device.

    They lie in the same memory at every step. Where a rank holds whole masters on its device, they are views of masters
    and averages, and `refresh` does nothing. Elsewhere one all-gather of all of them brings what other ranks updated.
    """

    def __init__(
        self,
        fragments: Sequence[Fragment],
        masters: Mapping[str, int],
        averages: Mapping[str, int],
        ranks: Ranks,
        *,
        sharded: bool,
    ) -> None:
        """masters, averages: the parameters' names and elements. sharded: whether ranks hold parts. Collective."""
        self._ranks = ranks
        self._gathers = sharded and ranks.world_size > 1
        self._copies: Tensor | None = None  # all values, one after the other
        pieces: list[tuple[int, Tensor]] = []  # of this rank: place among all values, and the live memory
        whole: list[dict[str, Tensor]] = [{}, {}]
        places: list[dict[str, int]] = [{}, {}]
        total = 0
        # Averages first, and the scales last: so norms' values begin at multiples of 16 bytes, as kernels like them.
        for sizes, starts in ((averages, places[1]), (masters, places[0])):
            for name, size in sizes.items():
                starts[name] = total
                total += size
        for fragment in fragments:
            for starts, held, tensor in zip(places, whole, (fragment.weight, fragment.ema), strict=True):
                if fragment.name in starts:
                    pieces.append((starts[fragment.name] + fragment.start, tensor))
                    held[fragment.name] = tensor
        if self._gathers or any(tensor.device != ranks.device for _, tensor in pieces):
            self._copies = torch.zeros(total, device=ranks.device)
            self._lay_out(pieces)
            for sizes, starts, held in zip((masters, averages), places, whole, strict=True):
                held |= {name: self._copies.narrow(0, starts[name], size) for name, size in sizes.items()}
        self.masters, self.averages = whole
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the values after an update, or a change from outside. Collective where ranks hold parts."""
        if self._copies is None:
            return
        own = torch.cat(self._pieces).to(self._ranks.device)
        if self._gathers:
            all_gather_flat(self._gathered, own)
        torch.index_select(self._gathered if self._gathers else own, 0, self._order, out=self._copies)

    def _lay_out(self, pieces: Sequence[tuple[int, Tensor]]) -> None:
        """Find where each value lies in what ranks gather: every rank gives equally many, of which some are padding."""
        device = self._ranks.device
        self._pieces = [tensor for _, tensor in pieces]
        own = [torch.arange(start, start + tensor.numel()) for start, tensor in pieces]
        positions = torch.cat([*own, torch.empty(0, dtype=torch.int64)]).to(device)
        if self._gathers:
            most = torch.tensor(positions.numel(), device=device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            padding = int(most) - positions.numel()
            states_on = self._pieces[0].device if self._pieces else device  # torch.cat takes tensors of one device
            self._pieces.append(torch.zeros(padding, device=states_on))
            own_positions = torch.nn.functional.pad(positions, (0, padding), value=-1)
            positions = own_positions.repeat(self._ranks.world_size)
            all_gather_flat(positions, own_positions)
            self._gathered = torch.empty(positions.numel(), device=device)
        assert self._copies is not None
        self._order = torch.zeros(self._copies.numel(), dtype=torch.int32, device=device)
        (filled,) = (positions >= 0).nonzero(as_tuple=True)
        self._order[positions[filled]] = filled.int()
