"""The stages of ZeRO: how DeepSpeed lays student and teacher over the ranks, a class for each layout.

Only this file branches on the stage. Only this file and layout.py read DeepSpeed's insides, as they are in the versions
that pyproject.toml admits. DeepSpeed's public functions (deepspeed.utils.safe_get_*) are not enough: they gather whole
parameters, or give parts at stage 3 only, and never say where a part begins.

- Unsharded (stage 0): every rank holds everything.
- ShardedStates (stages 1 and 2): each group of the optimizer is one flat tensor, cut into one shard a rank. Masters,
  moments and average are shards, and the gradients once they are reduced; the weights stay whole. OffloadedStates: the
  same with shards on the host.
- ShardedWeights (stage 3): each parameter is cut into one part a rank, the weights too.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Size, Tensor, nn
from typing_extensions import override

from cosmos_scale.config import RunConfig
from cosmos_scale.engine.deepspeed_config import deepspeed_config, gradient_bucket, teacher_deepspeed_config
from cosmos_scale.engine.gradients import GradientBuckets, cut_groups
from cosmos_scale.engine.layout import Layout, Placement
from cosmos_scale.engine.lookup import leave_tables_ungathered
from cosmos_scale.engine.optimizer import AdamWEma
from cosmos_scale.engine.ranks import Ranks
from cosmos_scale.engine.teacher_weights import CopiedTeacher, GatheredTeacher, ShardedTeacher, TeacherWeights
from cosmos_scale.fragments import Fragment
from cosmos_scale.loss.gather import all_gather_flat
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.phases import phase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIVE_WEIGHTS = 50_000_000
REUSED_WEIGHTS = 20_000_000
PERSISTENT_WEIGHTS = 100_000
"""Stage 3 keeps parameters of fewer elements than this whole on every rank: norms, biases, scales."""


class Unsharded(Layout):
    """Stage 0: masters, moments, average and weights are whole on every rank."""

    sharded = False

    def __init__(self, model: nn.Module, engine: Any, optimizer: AdamWEma, config: RunConfig, ranks: Ranks) -> None:
        super().__init__(model, engine, optimizer, config, ranks)
        engine.enable_backward_allreduce = False  # `backward` reduces the gradients itself
        self.owned = ranks.is_main
        self.masters = [list(group["params"]) for group in optimizer.param_groups]
        # In low precision the masters are copies, and DeepSpeed lists the weights in the same order.
        copied: list[list[Any]] = getattr(self._wrapper, "fp16_groups", [])
        self._weights, optimizer.weight_copies = copied or [list(group) for group in self.masters], list(copied)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.placements = [
            Placement(names[id(weight)], weight, weight.shape, 0, weight.numel(), master, 0)
            for weights, masters in zip(self._weights, self.masters, strict=True)
            for weight, master in zip(weights, masters, strict=True)
        ]
        self._bucket = gradient_bucket(sum(placement.count for placement in self.placements))

    @staticmethod
    @override
    def zero_keys(config: RunConfig, elements: int) -> dict[str, Any]:
        return {"compute_grad_norm": True}

    @property
    @override
    def scaler(self) -> Any:
        return self._wrapper.loss_scale_config if self.engine.fp16_enabled() else None

    @override
    def backward(self, scalar: Tensor) -> None:
        self._note_loss_scale()
        # DeepSpeed (0.19) divides fp16 gradients by the loss scale, but does not multiply the loss by it at stage 0.
        self.engine.backward(scalar * self._loss_scale, scale_wrt_gas=False)
        # DeepSpeed's own reduction would make a second copy of all gradients, in one process too.
        if self.ranks.world_size > 1 and self.engine.is_gradient_accumulation_boundary():
            with phase("reduction"):
                self.engine.allreduce_gradients(bucket_size=self._bucket)

    @override
    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    @override
    def _take_gradients(self) -> list[list[Tensor]]:
        taken = [
            [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
            for weights in self._weights
        ]
        for placement in self.placements:
            placement.parameter.grad = None
        return taken

    @override
    def _share_weights(self) -> None:
        pass  # every rank updates all weights

    @override
    def publish(self) -> None:
        for placement in self.placements:
            if placement.master is not placement.parameter:
                placement.parameter.copy_(placement.master)

    @override
    def teacher_weights(self, teacher: nn.Module, forward: nn.Module, fragments: Sequence[Fragment]) -> TeacherWeights:
        own = dict(teacher.named_parameters())
        if self.config.precision != "fp32":
            copies = iter(own[placement.name] for placement in self.placements)
            self.optimizer.average_copies = [[next(copies) for _ in masters] for masters in self.masters]
            return CopiedTeacher(forward, *self._copies_and_averages())
        for fragment in fragments:
            own[fragment.name].data = fragment.ema.view(fragment.shape)
        return TeacherWeights(forward)

    @override
    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return value  # every rank has all gradients


class _Sharded(Layout):
    """What stages 1 to 3 share: masters are flat shards, on the host where they are offloaded."""

    @override
    def gradients(self) -> list[Tensor]:
        if not self.config.zero.offload:
            return [gradient for group in self._wrapper.averaged_gradients.values() for gradient in group]
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)  # DeepSpeed (0.19) waits for copies to the host only in its step
        return [shard.grad for group in self.masters for shard in group if shard.grad is not None]


class _FlatStates(_Sharded):
    """Stages 1 and 2: masters, moments and average are a flat shard for each group and rank; weights are whole."""

    def __init__(self, model: nn.Module, engine: Any, optimizer: AdamWEma, config: RunConfig, ranks: Ranks) -> None:
        super().__init__(model, engine, optimizer, config, ranks)
        self._exact_on_device = config.precision == "fp32" and not config.zero.offload
        if self._exact_on_device:
            self._share_masters()
        self.masters = [[shard] for shard in self._wrapper.single_partition_of_fp32_groups]
        if config.precision != "fp32":
            optimizer.weight_copies = [[parts[ranks.rank]] for parts in self._wrapper.parallel_partitioned_bit16_groups]
        self.placements = list(self._placed({id(parameter): name for name, parameter in model.named_parameters()}))
        self._groups = [list(parameters) for parameters in self._wrapper.bit16_groups]

    @override
    def _take_gradients(self) -> list[list[Tensor]]:
        taken = list(self._wrapper.averaged_gradients.values())
        self._wrapper.averaged_gradients = {}
        return taken

    @override
    def _share_weights(self) -> None:
        if self.ranks.world_size > 1:
            groups = (self._wrapper.bit16_groups_flat, self._wrapper.parallel_partitioned_bit16_groups)
            for flat, parts in zip(*groups, strict=True):
                all_gather_flat(flat, parts[self.ranks.rank])

    @override
    def publish(self) -> None:
        self._wrapper.update_lp_params()

    @override
    def teacher_weights(self, teacher: nn.Module, forward: nn.Module, fragments: Sequence[Fragment]) -> TeacherWeights:
        is_average = self._exact_on_device and self.ranks.world_size == 1
        averages = [self.optimizer.state[shard]["ema"] for (shard,) in self.masters]
        flats = averages if is_average else self._empty_flats(next(teacher.parameters()).dtype)
        self._lay_into(flats, teacher)
        if is_average:
            return TeacherWeights(forward)
        gathered = GatheredTeacher(forward, flats, averages, self.ranks.rank)
        self.optimizer.average_copies = [[part] for part in gathered.parts]
        return gathered

    def _share_masters(self) -> None:
        """Make fp32 masters views of this rank's part of the fp32 weights: DeepSpeed made a copy of this part."""
        for parts, master in zip(
            self._wrapper.parallel_partitioned_bit16_groups, self._wrapper.single_partition_of_fp32_groups, strict=True
        ):
            master.data = parts[self.ranks.rank].detach()
        self._wrapper._link_all_hp_params()  # else DeepSpeed would keep to the masters' old memory

    def _placed(self, names: dict[int, str]) -> Iterator[Placement]:
        for parameters, (master,) in zip(self._wrapper.bit16_groups, self.masters, strict=True):
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is None:  # the parameter lies on other ranks
                    continue
                piece, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                name = names[id(parameter)]
                yield Placement(name, parameter, parameter.shape, piece.start, piece.numel, master, place.start)

    def _empty_flats(self, dtype: torch.dtype) -> list[Tensor]:
        return [torch.zeros_like(flat, dtype=dtype) for flat in self._wrapper.bit16_groups_flat]

    def _lay_into(self, flats: list[Tensor], teacher: nn.Module) -> None:
        """Make the teacher's weights views of flat tensors, laid out like the student's, so that shards line up."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        own = dict(teacher.named_parameters())
        for flat, student_flat, parameters in zip(flats, self._wrapper.bit16_groups_flat, self._groups, strict=True):
            for parameter in parameters:
                # The student's parameter is a view of its flat tensor: the same place serves the teacher's.
                offset = (parameter.data_ptr() - student_flat.data_ptr()) // parameter.element_size()
                own[names[id(parameter)]].data = flat.narrow(0, offset, parameter.numel()).view_as(parameter)


class ShardedStates(_FlatStates):
    """Stages 1 and 2 on the device. The gradients take a way of their own, engine/gradients.py.

    DeepSpeed would copy each gradient twice, all-reduce whole gradients after the backward, and clear and set each
    parameter several times a step. Here it knows the flat groups alone: the weights are views of these.
    """

    def __init__(self, model: nn.Module, engine: Any, optimizer: AdamWEma, config: RunConfig, ranks: Ranks) -> None:
        super().__init__(model, engine, optimizer, config, ranks)
        engine.enable_backward_allreduce = False
        self._buckets = GradientBuckets(
            self._groups,
            [flat.numel() for flat in self._wrapper.bit16_groups_flat],
            ranks,
            traffic=DTYPES[config.zero.gradient_dtype],
            accumulates_whole=config.zero.stage == 1,
        )
        for parameters in (*self._wrapper.bit16_groups, *self._wrapper.params_in_partition):
            parameters.clear()
        for parameters in self._wrapper.params_not_in_partition:
            parameters.clear()
        for parameter in model.parameters():
            parameter._hp_mapping = None  # type: ignore[attr-defined]  # holds views of the masters

    @staticmethod
    @override
    def zero_keys(config: RunConfig, elements: int) -> dict[str, Any]:
        # Without hooks and buffers of DeepSpeed's, and without its norm, which the host would wait for.
        return {"stage": 1, "contiguous_gradients": False, "compute_grad_norm": False}

    @staticmethod
    @override
    def optimizer_groups(groups: list[dict[str, Any]], model: CosmosModel, world_size: int) -> list[dict[str, Any]]:
        if world_size == 1:
            return groups
        elements = sum(parameter.numel() for group in groups for parameter in group["params"])
        return cut_groups(groups, gradient_bucket(elements), model.image_tower_parameters())

    @override
    def backward(self, scalar: Tensor) -> None:
        last = self.engine.is_gradient_accumulation_boundary()
        with self._buckets.taken(last=last) as shards:
            super().backward(scalar)
        if last:
            self._wrapper.averaged_gradients = {group: [shard] for group, shard in enumerate(shards)}


class OffloadedStates(_FlatStates):
    """Stages 1 and 2 with masters, moments and average on the host, where DeepSpeed brings the gradients."""

    @staticmethod
    @override
    def zero_keys(config: RunConfig, elements: int) -> dict[str, Any]:
        return {}


class ShardedWeights(_Sharded):
    """Stage 3: each parameter is cut into equal parts, one a rank; the last parts may be shorter, or all padding."""

    weights_stay = False  # they are gathered into other memory at each forward

    def __init__(self, model: nn.Module, engine: Any, optimizer: AdamWEma, config: RunConfig, ranks: Ranks) -> None:
        super().__init__(model, engine, optimizer, config, ranks)
        self.masters = [[] for _ in optimizer.param_groups]
        # A group of over 10^9 elements has several shards.
        for sub_group, shard in enumerate(self._wrapper.fp32_partitioned_groups_flat):
            self.masters[self._wrapper.sub_group_to_group_id[sub_group]].append(shard)
        optimizer.weight_copies = self._by_group(self._wrapper.fp16_partitioned_groups_flat)
        self.placements = list(self._placed({id(parameter): name for name, parameter in model.named_parameters()}))
        leave_tables_ungathered(model)

    @staticmethod
    @override
    def zero_keys(config: RunConfig, elements: int) -> dict[str, Any]:
        return {
            # True would replace torch.nn.functional.linear in the whole process. The model has a linear map of its own
            # (kernels/linear.py), which saves the same memory.
            "memory_efficient_linear": False,
            # With the defaults a model of up to 10^9 elements would stay whole on every rank. In elements:
            "stage3_prefetch_bucket_size": min(REUSED_WEIGHTS, elements // 8),  # gathered ahead
            "stage3_max_live_parameters": min(LIVE_WEIGHTS, elements // 3),  # gathered at one time
            # A tensor stays gathered if the model uses it again within this many elements.
            "stage3_max_reuse_distance": min(REUSED_WEIGHTS, elements // 8),
            "stage3_param_persistence_threshold": PERSISTENT_WEIGHTS,
        }

    @override
    def _take_gradients(self) -> list[list[Tensor]]:
        self._wrapper._pre_step()
        self._wrapper.parameter_offload.partition_all_parameters()
        self._wrapper.zero_grad(set_to_none=True)
        self._wrapper.averaged_gradients.clear()
        sizes = [shard.numel() for shard in self._wrapper.fp32_partitioned_groups_flat]
        return self._by_group(self._wrapper.grad_partitions_flat_buffer.split(sizes))

    @override
    def _share_weights(self) -> None:
        kept = self._wrapper.persistent_parameters  # small parameters, which stay gathered on every rank
        if kept:  # in one all-gather: `all_gather` has one for each parameter
            kept[0].all_gather_coalesced(kept).wait()
        gathers = self._wrapper.parameter_offload._DeepSpeedZeRoOffload__allgather_stream  # None on a CPU
        if gathers is not None:  # DeepSpeed (0.19) does not let its gathers wait for what this stream writes
            gathers.wait_stream(torch.cuda.current_stream(self.ranks.device))

    @override
    def publish(self) -> None:
        self._wrapper.parameter_offload.partition_all_parameters()
        pairs = zip(self._wrapper.fp16_partitioned_groups_flat, self._wrapper.fp32_partitioned_groups_flat, strict=True)
        for weights, shard in pairs:
            weights.copy_(shard)
        self._share_weights()

    @override
    def whole_model(self) -> AbstractContextManager[None]:
        return _gathered(self.engine)

    @override
    def teacher_weights(self, teacher: nn.Module, forward: nn.Module, fragments: Sequence[Fragment]) -> TeacherWeights:
        import deepspeed  # here, since its import takes seconds and --help should not

        elements = sum(parameter.numel() for parameter in teacher.parameters())
        # Parameters that stayed gathered would not see what is written into the shards.
        kept = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
        zero = {"stage": 3, **self.zero_keys(self.config, elements), **kept}
        keys = teacher_deepspeed_config(self.config, self.ranks.world_size, zero)
        # Without an optimizer: DeepSpeed only shards the weights, and gathers them module by module in the forward.
        engine, *_ = deepspeed.initialize(model=forward, config=keys)
        self.optimizer.average_copies = self._by_group(self._laid_like_masters(teacher))
        return ShardedTeacher(engine, *self._copies_and_averages(), lambda: _gathered(engine))

    def _laid_like_masters(self, teacher: nn.Module) -> list[Tensor]:
        """Make this rank's parts of the teacher's weights views of flat tensors, laid out like the masters."""
        own: dict[str, Any] = dict(teacher.named_parameters())  # DeepSpeed adds `ds_tensor`: this rank's part
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        flats = []
        for parameters in self._wrapper.fp16_groups:
            parts = [own[names[id(parameter)]].ds_tensor for parameter in parameters]
            flats.append(torch.cat(parts))
            for part, place in zip(parts, flats[-1].split([part.numel() for part in parts]), strict=True):
                part.data = place
        return flats

    def _by_group(self, shards: Sequence[Tensor]) -> list[list[Tensor]]:
        groups: list[list[Tensor]] = [[] for _ in self.masters]
        for sub_group, shard in enumerate(shards):
            groups[self._wrapper.sub_group_to_group_id[sub_group]].append(shard)
        return groups

    def _placed(self, names: dict[int, str]) -> Iterator[Placement]:
        rank = self.ranks.rank
        groups = zip(self._wrapper.fp16_groups, self._wrapper.fp32_partitioned_groups_flat, strict=True)
        for parameters, master in groups:
            place = 0
            for parameter in parameters:
                part, start = parameter.partition_numel(), rank * parameter.partition_numel()
                count = min(part, parameter.ds_numel - start)
                if count > 0:
                    shape = Size(parameter.ds_shape)
                    yield Placement(names[id(parameter)], parameter, shape, start, count, master, place)
                place += part


@contextmanager
def _gathered(engine: Any) -> Iterator[None]:
    """Hold the whole weights of a stage-3 engine's module on every rank; inside, call the module without its engine."""
    from deepspeed.runtime.zero import unwrap_model_for_generation  # here, since its import takes seconds

    with unwrap_model_for_generation(engine):
        yield


LAYOUTS: dict[int, type[Layout]] = {0: Unsharded, 1: ShardedStates, 2: ShardedStates, 3: ShardedWeights}
"""The layout of each stage, where nothing is offloaded."""


def layout_of(config: RunConfig) -> type[Layout]:
    """Return the layout of a config's stage."""
    kind = LAYOUTS[config.zero.stage]
    return OffloadedStates if config.zero.offload and kind is ShardedStates else kind


def lay_out(model: CosmosModel, optimizer: AdamWEma, config: RunConfig, ranks: Ranks) -> Layout:
    """Hand a model on the ranks' device to DeepSpeed; return the layout of the config's stage. Collective."""
    import deepspeed  # here, since its import takes seconds and --help should not

    kind = layout_of(config)
    elements = sum(parameter.numel() for parameter in model.parameters())
    keys = deepspeed_config(config, ranks.world_size, elements, kind.zero_keys(config, elements))
    optimizer.param_groups = kind.optimizer_groups(optimizer.param_groups, model, ranks.world_size)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=keys)
    return kind(model, engine, optimizer, config, ranks)
