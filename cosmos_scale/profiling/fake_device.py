"""Tensors on the CPU that nobody computes with: a step's code runs at any size, and only its control flow computes.

torch's FakeTensorMode has no addresses and no values, which DeepSpeed and the engine ask for. Here tensors are real and
their memory is reserved, but nothing writes to it, so the system gives them none. Small tensors and whole numbers are
computed as ever: lengths, orders, flags.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from cosmos_scale.profiling.allocations import AllocationLog
from cosmos_scale.profiling.collectives import Collective, collective_of
from cosmos_scale.profiling.operators import META, Count, PhasedMode, count_operator, group_of, short_name

SMALL = 4096  # elements of tensors that are computed
_WHOLE_NUMBERS = frozenset({torch.int16, torch.int32, torch.int64, torch.bool})
# Operators that move no values, and are not marked as views.
_FREE = frozenset(
    {"is_pinned", "_unsafe_view", "_reshape_alias", "lift_fresh", "set_", "resize_", "_local_scalar_dense", "detach_"}
)
OperatorShape = tuple[int, ...]


class FakeDevice(PhasedMode):
    """Runs operators without their work, and notes what they ask for. A context manager.

    as_gpu: whether memory is rounded up as on a GPU. most: what ranks find as the largest of their whole numbers, which
    this rank cannot know of the others; the engine asks for one such number. operators: {(phase, operator, shape,
    dtype): Count}; the shape is of `operator_shape`. collectives: in the order of the calls. calls: operators that the
    host called, views too, by phase. flops: of products and attention, by phase. flops_before: of each collective, its
    phase's until then. Notes are taken between `begin` and the end.
    """

    def __init__(self, *, as_gpu: bool, most: int) -> None:
        super().__init__()
        self._as_gpu, self._most = as_gpu, most
        self.allocations = AllocationLog(512 if as_gpu else 1)
        self.operators: dict[tuple[str, str, OperatorShape, str], Count] = {}
        self.collectives: list[Collective] = []
        self.calls: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        self.flops_before: list[int] = []
        self._recording = False

    def begin(self) -> None:
        """Take notes from now on."""
        self.allocations.begin()
        self._recording = True

    def enter_phase(self, phase: str) -> None:
        """Say which phase of the step runs from now on."""
        self._phase = phase
        self.allocations.enter_phase(phase)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        output = func(*args, **kwargs) if _computes(func, args, kwargs) else _without_work(func, args, kwargs)
        self.allocations.note(output, self._phase)
        if self._recording:
            self.calls[self._phase] = self.calls.get(self._phase, 0) + 1
            count = count_operator(func, args, kwargs, output)
            if count is not None:
                name = short_name(func)
                shape, dtype, flops = operator_shape(name, func, args, kwargs)
                if flops:
                    count = count._replace(flops=flops)
                self.flops[self._phase] = self.flops.get(self._phase, 0) + count.flops
                place = (self._phase, name, shape, dtype)
                self.operators[place] = self.operators.get(place, Count()).plus(count)
        return output

    def _communicate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = collective_of(func, args, self._phase)
        if found is None and short_name(func) not in ("barrier", "monitored_barrier_"):
            raise NotImplementedError(f"{func.name()}: nobody has said what this collective moves")
        if found is not None and self._recording:
            self.collectives.append(found)
            self.flops_before.append(self.flops.get(self._phase, 0))
        if found is not None and (found.kind, found.dtype, found.elements) == ("all_reduce", torch.int64, 1):
            args[0][0].fill_(self._most)
        if found is not None and found.kind == "reduce_scatter" and not self._as_gpu:
            # gloo, which CPUs have, adds up in a copy of what it is handed.
            asynchronous = args[4] if len(args) > 4 else kwargs.get("async_op", True)
            self.allocations.note_copy(args[1], self._phase, lasts=bool(asynchronous))
        there = tree_map_only(Tensor, _on_meta, (args, kwargs))
        output = func(*there[0], **there[1])
        if isinstance(output, tuple):  # the tensors and the handle to wait for
            return (args[0], *output[1:])
        return output


def operator_shape(
    name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[OperatorShape, str, int]:
    """Return what decides an operator's speed: its sizes and its dtype; and the operations of attention, else 0.

    Sizes: of a product (batch, m, k, n); of attention (segments, longest queries, longest keys, heads, width of a head,
    1 if causal else 0). Others: none, they read and write bytes.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    floats = [tensor for tensor in tensors if tensor.dtype.is_floating_point]
    dtype = str(floats[-1].dtype if floats else tensors[0].dtype if tensors else "").removeprefix("torch.")
    if name in ("mm", "addmm", "bmm", "baddbmm", "_linear_pointwise"):
        a, b = floats[-2:] if name in ("addmm", "baddbmm") else floats[:2]
        if name == "_linear_pointwise":
            return (1, a.shape[0], a.shape[1], b.shape[0]), dtype, 2 * a.shape[0] * b.numel()
        batch = a.shape[0] if a.dim() == 3 else 1
        return (batch, a.shape[-2], a.shape[-1], b.shape[-1]), dtype, 0
    if group_of(name) == "attention":
        return _attention(name, func, args, kwargs, dtype)
    return (), dtype, 0


def _attention(
    name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: str
) -> tuple[OperatorShape, str, int]:
    """Return sizes, dtype and operations of attention over packed segments, or over equally long ones."""
    named = {
        argument.name: args[place] if place < len(args) else kwargs.get(argument.name, argument.default_value)
        for place, argument in enumerate(func._schema.arguments)
    }
    query, key = named["query"], named["key"]
    window = named.get("window_size")
    causal = bool(named.get("is_causal")) or (window is not None and list(window) == [-1, 0])
    products = 5 if "backward" in name else 2
    if "cu_seq_q" in named:
        queries, keys = (named[which].diff().long() for which in ("cu_seq_q", "cu_seq_k"))
        pairs = int((queries * (queries + 1) // 2 if causal else queries * keys).sum())
        segments, longest = len(queries), (int(named["max_q"]), int(named["max_k"]))
        heads, width = query.shape[1:]
    else:
        (segments, heads, rows, width), columns = query.shape, key.shape[-2]
        pairs, longest = segments * (rows * (rows + 1) // 2 if causal else rows * columns), (rows, columns)
    return (segments, *longest, heads, width, int(causal)), dtype, products * 2 * pairs * heads * width


def _computes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether an operator is to be computed: it moves nothing, or its tensors are small or whole numbers."""
    name = short_name(func)
    if name in _FREE or func.is_view or torch.Tag.inplace_view in func.tags or name.startswith(("empty", "new_empty")):
        return True
    if kwargs.get("device") == META:
        return True
    if func.namespace != "aten" or func._overloadname == "dtype":  # a product of another dtype: only GPUs have it
        return False
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return True
    if not tensors:
        return _elements_made(args) <= SMALL or kwargs.get("dtype") in _WHOLE_NUMBERS or name.startswith("arange")
    return all(tensor.dtype in _WHOLE_NUMBERS or tensor.numel() <= SMALL for tensor in tensors)


def _elements_made(args: tuple[Any, ...]) -> int:
    """Return the elements that a factory makes: its first argument is the shape."""
    elements = 1
    for size in args[0] if args and isinstance(args[0], list | tuple) else ():
        elements *= size
    return elements


def _without_work(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what an operator returns, without values."""
    returns = func._schema.returns
    if not returns:
        return None
    if all(found.alias_info is not None and found.alias_info.is_write for found in returns):
        written = [
            args[place] if place < len(args) else kwargs.get(argument.name)
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        return written[0] if len(returns) == 1 else tuple(written)
    there_args, there_kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        there_kwargs = {**there_kwargs, "device": META, "pin_memory": False}
    return tree_map_only(Tensor, _reserved, func(*there_args, **there_kwargs))


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def _reserved(tensor: Tensor) -> Tensor:
    """Return memory that nobody has written to; small tensors are zero, since the host may read them."""
    reserved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return reserved.zero_() if reserved.numel() <= SMALL else reserved
