"""The memory that tensors take during a step, as their storages come and go: its peaks, and what holds it then."""

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cosmos_scale.profiling.memory_timeline import BEFORE

OWNERS = (
    *("weights", "gathered weights", "teacher", "masters", "moments", "average", "gradients", "buffers"),
    *("batch", "activations", "scratch"),
)
"""Who holds memory, in the order of tables; see `AllocationLog`."""


class PhasePeak(NamedTuple):
    """The memory of a phase, in bytes. peak: the most at one time. parts: of that moment, by owner. left: at the end.

    most: of each owner, its most at one time, which may be another moment. Owners are those of OWNERS. taken: the peak
    by the phase that has taken it, as in a profile: what the step finds is BEFORE's, and the batch is that of "data".
    """

    phase: str
    peak: int
    parts: dict[str, int]
    left: dict[str, int]
    most: dict[str, int]
    taken: dict[str, int]


class _Piece:
    """A storage: its bytes, the phase and the time in which it was made, when it was given up, and who holds it."""

    __slots__ = ("born", "died", "nbytes", "owner", "phase")

    def __init__(self, nbytes: int, phase: str, born: int, owner: str | None) -> None:
        self.nbytes, self.phase, self.born, self.owner = nbytes, phase, born, owner
        self.died: int | None = None


class AllocationLog:
    """Notes each storage that operators return, from its first tensor to its end.

    granule: bytes are rounded up to a multiple of it, as an allocator does. Owners are those that `own` names. Of the
    others: what was there when a step began holds "buffers"; what the student's forward leaves for later phases,
    "activations"; what DeepSpeed makes for weights and gradients, "gathered weights" and "gradients"; the rest,
    "scratch": operators' results that nobody keeps, gradients of activations, and blocks that are computed again.
    Memory that an operator takes and gives up inside itself is not seen.
    """

    def __init__(self, granule: int) -> None:
        self._granule = granule
        self._live: dict[int, tuple[_Piece, weakref.ref[Any]]] = {}
        self._pieces: list[_Piece] = []
        self._time = 0
        self._marks: list[tuple[int, str]] = []  # when each phase of the recorded step began
        self._recording = False

    def note(self, output: Any, phase: str) -> None:
        """Note the new storages of an operator's result."""
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                self._enter(leaf, phase)

    def note_copy(self, tensors: Any, phase: str, *, lasts: bool) -> None:
        """Note the copies that an operator makes of tensors: until these are given up (`lasts`), or for the call."""
        for tensor in tree_leaves(tensors):
            copies = [torch.empty_like(tensor)]
            self._enter(copies[0], phase, "scratch")
            if lasts:
                weakref.finalize(tensor.untyped_storage(), copies.clear)

    def own(self, tensors: Iterable[Tensor | None], owner: str) -> None:
        """Say who holds the storages of tensors; the first who is named stays."""
        for tensor in tensors:
            if tensor is not None:
                piece = self._enter(tensor, "")
                if piece is not None and piece.owner is None:
                    piece.owner = owner

    def begin(self) -> None:
        """Begin to record a step: what is alive now was there before."""
        self._pieces = [piece for piece, _ in self._live.values()]
        for piece in self._pieces:
            piece.phase, piece.owner = "", piece.owner or "buffers"
        self._marks.clear()
        self._recording = True

    def enter_phase(self, phase: str) -> None:
        """Note that a phase of the step begins."""
        self._time += 1
        self._marks.append((self._time, phase))

    def peaks(self) -> list[PhasePeak]:
        """Return the memory of each phase since `begin`, in the order of the phases."""
        self._time += 1
        limits = [*(start for start, _ in self._marks[1:]), self._time]
        ends = {phase: end for (_, phase), end in zip(self._marks, limits, strict=True)}
        changes = sorted(_changes(self._pieces, ends, self._time))
        held: dict[str, int] = {}
        taken: dict[str, int] = {}
        found, place, total = [], 0, 0
        for start, phase in self._marks:
            peak, parts, most, by_phase = total, dict(held), dict(held), dict(taken)
            for time, nbytes, owner, born in changes[place:]:
                if time >= ends[phase]:
                    break
                place += 1
                held[owner] = held.get(owner, 0) + nbytes
                taken[born] = taken.get(born, 0) + nbytes
                most[owner] = max(most.get(owner, 0), held[owner])
                total += nbytes
                if time >= start and total > peak:
                    peak, parts, by_phase = total, dict(held), dict(taken)
            by_size = {born: by_phase[born] for born in sorted(by_phase, key=lambda born: -by_phase[born])}
            known = {born: nbytes for born, nbytes in by_size.items() if nbytes}
            found.append(PhasePeak(phase, peak, _in_order(parts), _in_order(held), _in_order(most), known))
        return found

    def _enter(self, tensor: Tensor, phase: str, owner: str | None = None) -> _Piece | None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._live:
            return self._live[key][0]
        if not nbytes:
            return None
        self._time += 1
        if owner is None and self._recording:
            owner = _owner_by_caller(phase)
        piece = _Piece(-(-nbytes // self._granule) * self._granule, phase, self._time, owner)
        self._live[key] = piece, weakref.ref(storage, lambda _: self._leave(key, piece))
        if self._recording:
            self._pieces.append(piece)
        return piece

    def _leave(self, key: int, piece: _Piece) -> None:
        self._time += 1
        piece.died = self._time
        if key in self._live and self._live[key][0] is piece:
            del self._live[key]


def _in_order(parts: Mapping[str, int]) -> dict[str, int]:
    """Return what is held, in the order of OWNERS."""
    return {owner: parts[owner] for owner in OWNERS if parts.get(owner)}


def _changes(pieces: Iterable[_Piece], ends: Mapping[str, int], now: int) -> Iterator[tuple[int, int, str, str]]:
    """Yield when memory came and went, its bytes, its owner, and the phase that has taken it: see `PhasePeak`."""
    for piece in pieces:
        died = now + 1 if piece.died is None else piece.died
        owner = piece.owner or ("activations" if piece.phase == "student" and died > ends["student"] else "scratch")
        taken = piece.phase or ("data" if owner == "batch" else BEFORE)
        yield piece.born if piece.phase else 0, piece.nbytes, owner, taken
        if piece.died is not None:
            yield died, -piece.nbytes, owner, taken


def _owner_by_caller(phase: str) -> str | None:
    """Tell who holds what is being made, where the code that makes it says so."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.endswith("/engine/gradients.py"):
            return "gradients"
        if "/deepspeed/runtime/zero/" in name:
            gathers = name.endswith(("partition_parameters.py", "partitioned_param_coordinator.py"))
            return "gathered weights" if gathers else "gradients" if phase == "backward" else "scratch"
        if ("/cosmos_scale/" in name and "/profiling/" not in name) or "/torch/autograd/" in name:
            return None
        frame = frame.f_back
    return None
