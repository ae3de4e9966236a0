"""Where DeepSpeed keeps this rank's fp32 elements of each parameter, stage by stage of ZeRO.

DeepSpeed's public functions (deepspeed.utils.safe_get_*) gather whole parameters, or give parts at stage 3 alone, and
never say where a part begins. So its insides are read here, and in the student and the teacher: those of the versions
that pyproject.toml admits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Size, Tensor, nn


@dataclass(frozen=True)
class Placement:
    """Where `count` elements of a parameter, from element `start` on, lie in the fp32 master tensor `master`."""

    name: str
    parameter: nn.Parameter
    shape: Size
    start: int
    count: int
    master: Tensor
    master_start: int


class Names:
    """Names and whole shapes of a model's parameters, taken before DeepSpeed cuts them up."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(parameter): (name, parameter.shape) for name, parameter in model.named_parameters()}

    def of(self, parameter: nn.Parameter) -> tuple[str, Size]:
        """The name and the whole shape of a parameter."""
        return self._names[id(parameter)]


def masters(engine: Any, stage: int, groups: list[dict[str, Any]]) -> list[list[Tensor]]:
    """This rank's fp32 masters for each of the optimizer's groups: parameters at stage 0, else flat shards."""
    wrapper = engine.optimizer
    if stage == 0:
        return [list(group["params"]) for group in groups]
    if stage < 3:
        return [[shard] for shard in wrapper.single_partition_of_fp32_groups]
    shards: list[list[Tensor]] = [[] for _ in groups]
    for sub_group, shard in enumerate(
        wrapper.fp32_partitioned_groups_flat
    ):  # a group of over 10^9 elements has several
        shards[wrapper.sub_group_to_group_id[sub_group]].append(shard)
    return shards


def placements(engine: Any, stage: int, rank: int, shards: list[list[Tensor]], names: Names) -> Iterator[Placement]:
    """Yield what this rank owns of each parameter; at stage 0 every rank owns all of it."""
    wrapper = engine.optimizer
    if stage == 0:
        low = [p for group in getattr(wrapper, "fp16_groups", []) for p in group]
        whole = [master for group in shards for master in group]
        for parameter, master in zip(low or whole, whole, strict=True):
            name, shape = names.of(parameter)
            yield Placement(name, parameter, shape, 0, shape.numel(), master, 0)
    elif stage < 3:
        for parameters, (master,) in zip(wrapper.bit16_groups, shards, strict=True):
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is None:  # another rank's
                    continue
                piece, shard = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Placement(*_named(parameter, names), piece.start, piece.numel, master, shard.start)
    else:
        # Each parameter is cut into equal parts, a part a rank; the last parts may be shorter, or padding altogether.
        for parameters, master in zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True):
            place = 0
            for parameter in parameters:
                part, start = parameter.partition_numel(), rank * parameter.partition_numel()
                count = min(part, parameter.ds_numel - start)
                if count > 0:
                    yield Placement(*_named(parameter, names), start, count, master, place)
                place += part


def _named(parameter: nn.Parameter, names: Names) -> tuple[str, nn.Parameter, Size]:
    name, shape = names.of(parameter)
    return name, parameter, shape


@contextmanager
def whole(engine: Any) -> Iterator[None]:
    """Hold the whole weights of a stage-3 engine's module on every rank; does nothing where `engine` is None.

    Inside, the module may be called without its engine, and by one rank more often than by another. Collective.
    """
    if engine is None:
        yield
        return
    from deepspeed.runtime.zero import unwrap_model_for_generation  # here, since it takes seconds

    with unwrap_model_for_generation(engine):
        yield
