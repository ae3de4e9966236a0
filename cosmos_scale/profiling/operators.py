"""What a step asks of a device, counted without one: launches of kernels, bytes read and written, matrix products.

The step's own code runs on tensors of the device "meta", which have shapes and no memory, so any size is counted in
seconds. Operators that make a view or reserve memory launch nothing and are left out. Each other operator counts as one
launch, although some operators of a GPU launch two or three kernels: the backward of a norm, for instance.

Bytes are those of the operands: each tensor that an operator reads, and each tensor that it writes, once. Caches of the
device are not modelled. A lookup (embedding, index_select, gather) reads the rows that it returns, not the table.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

META = torch.device("meta")
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_linear_pointwise"}
LOOKUPS = {"embedding", "index_select", "gather", "index"}
# Operators whose first operand is written, not read.
FILLS = {"copy_", "fill_", "zero_", "index_copy_", "index_put_", "write_patches_"}
# Operands that the project's own operators write without reading them.
WRITTEN_ONLY = {("adamw_ema_update", "weight_copies"), ("adamw_ema_update", "average_copies")}
COPIES = {"copy_", "_to_copy", "clone", "cat", "stack", "_foreach_copy_"}
GROUPS = ("products", "attention", "copies", "norms and pointwise")


class Count(NamedTuple):
    """What some operators ask of a device. flops: of matrix products, a multiplication and an addition each."""

    launches: int = 0
    read: int = 0
    written: int = 0
    flops: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def plus(self, other: "Count") -> "Count":
        """Return the sum of both."""
        return Count(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def total(counts: Iterable[Count]) -> Count:
    """Return the sum of counts."""
    result = Count()
    for count in counts:
        result = result.plus(count)
    return result


class PhasedMode(TorchDispatchMode):
    """Sees the operators that run inside it, and the phase that each runs in. A context manager."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._phase = ""

    def enter_phase(self, name: str) -> None:
        """Name what runs from now on."""
        self._phase = name

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what runs inside."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before


class DeviceCounter(PhasedMode):
    """Counts the operators that run inside it, by phase and operator. A context manager.

    counts: {(phase, operator): Count}. Operators are named without their overload: `mm`, `native_layer_norm`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[tuple[str, str], Count] = {}

    def by_group(self, phase: str | None = None) -> dict[str, Count]:
        """Return the counts of each group of operators, of one phase or of all."""
        groups = dict.fromkeys(GROUPS, Count())
        for (where, operator), count in self.counts.items():
            if phase in (None, where):
                groups[group_of(operator)] = groups[group_of(operator)].plus(count)
        return groups

    def of_phase(self, phase: str) -> Count:
        """Return the counts of a phase."""
        return total(count for (where, _), count in self.counts.items() if where == phase)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs) if _runs_here(func, args) else _zeros(func, args, kwargs)
        count = count_operator(func, args, kwargs, output)
        if count is not None:
            place = (self._phase, short_name(func))
            self.counts[place] = self.counts.get(place, Count()).plus(count)
        return output


def group_of(operator: str) -> str:
    """Return the group, one of GROUPS, that an operator belongs to."""
    if operator in PRODUCTS or operator.startswith("contrastive"):
        return "products"
    if "varlen" in operator or "attention" in operator or "flash" in operator:
        return "attention"
    return "copies" if operator in COPIES else "norms and pointwise"


def short_name(func: Any) -> str:
    """Return an operator's name without its namespace and overload: `mm`."""
    name: str = func.name().split("::")[1].split(".")[0]
    return name


def count_operator(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Count | None:
    """Return what an operator asks of the device, or None where it launches nothing."""
    name = short_name(func)
    if name.startswith(("empty", "new_empty")):
        return None
    read, written = _operands(func, args, kwargs, name)
    given = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
    fresh = [tensor for tensor in tree_leaves(output) if isinstance(tensor, Tensor) and _storage(tensor) not in given]
    if not fresh and not written:
        return None  # a view, or a question to the host
    made = sum(map(_nbytes, fresh))
    if name in LOOKUPS:
        return Count(1, sum(map(_nbytes, read[1:])) + made, made)
    scratch = _scratch_bytes(func, args)
    if scratch:
        return Count(2, sum(map(_nbytes, read)) + scratch, sum(map(_nbytes, written)) + made + scratch)
    formula = flop_registry.get(func.overloadpacket)
    flops = 0 if formula is None or group_of(name) != "products" else int(formula(*args, **kwargs, out_val=output))
    return Count(1, sum(map(_nbytes, read)), sum(map(_nbytes, written)) + made, flops)


def _scratch_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Return the bytes that the first launch of one of the project's operators leaves to a second; 0: one launch."""
    if func.namespace != "cosmos_scale":
        return 0
    from cosmos_scale.kernels.triton_sums import SCRATCH_BYTES  # triton is there, since an operator of it ran

    formula = SCRATCH_BYTES.get(func._opname)
    return 0 if formula is None else formula(*args)


def _runs_here(func: Any, args: tuple[Any, ...]) -> bool:
    """Tell whether the tensors' device can run an operator: none of the project's runs on a CPU."""
    return func.namespace != "cosmos_scale" or all(
        leaf.device.type != "cpu" for leaf in tree_leaves(args) if isinstance(leaf, Tensor)
    )


def _zeros(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return zeros of the shapes that an operator returns, and leave all else as it is."""
    there = tree_map_only(Tensor, lambda tensor: tensor.to(META), (args, kwargs))
    return tree_map_only(Tensor, lambda tensor: torch.zeros_like(tensor, device="cpu"), func(*there[0], **there[1]))


def _operands(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that an operator reads and those among its arguments that it writes."""
    read: list[Tensor] = []
    written: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        value = kwargs.get(argument.name) if position >= len(args) else args[position]
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes:
            written += tensors
        if not writes or (not argument.is_out and name not in FILLS and (name, argument.name) not in WRITTEN_ONLY):
            read += tensors
    return read, written


def _storage(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place


def _nbytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor's elements take; expanded dimensions lie in memory once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or size == 0 else 1
    return elements * tensor.element_size()
