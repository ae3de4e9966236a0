"""The stages of ZeRO: how DeepSpeed lays student and teacher over the ranks, a class for each layout.

Only this file branches on the stage and reads DeepSpeed's insides, as they are in the versions that pyproject.toml
admits. DeepSpeed's public functions (deepspeed.utils.safe_get_*) are not enough: they gather whole parameters, or give
parts at stage 3 only, and never say where a part begins.

- Unsharded (stage 0): every rank holds everything.
- ShardedStates (stages 1 and 2): each group of the optimizer is one flat tensor, cut into one shard a rank. Masters,
  moments and average are shards; the weights stay whole. Stage 2 shards the gradients too, inside DeepSpeed.
- ShardedWeights (stage 3): each parameter is cut into one part a rank, the weights too.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Size, Tensor, nn
from typing_extensions import override

from cosmos_scale.config import RunConfig
from cosmos_scale.engine.deepspeed_config import (
    deepspeed_config,
    gradient_bucket,
    teacher_deepspeed_config,
)
from cosmos_scale.engine.optimizer import SCALES_GROUP, AdamWEma
from cosmos_scale.engine.ranks import Ranks
from cosmos_scale.engine.teacher_weights import CopiedTeacher, GatheredTeacher, ShardedTeacher, TeacherWeights
from cosmos_scale.fragments import Fragment
from cosmos_scale.loss.gather import all_gather_flat

NORM_PIECE = 2**14  # elements
LIVE_WEIGHTS = 50_000_000
REUSED_WEIGHTS = 20_000_000
PERSISTENT_WEIGHTS = 100_000
"""Stage 3 keeps parameters of fewer elements than this whole on every rank: norms, biases, scales."""


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


class Layout(ABC):
    """What a rank holds of a student inside its DeepSpeed engine.

    engine: DeepSpeed's. masters: this rank's fp32 tensors for each of the optimizer's groups. placements: where the
    elements that this rank holds lie in the masters. owned: whether this rank saves these elements; False where another
    rank saves the same elements.
    """

    masters: list[list[Tensor]]
    placements: list[Placement]
    owned = True

    def __init__(self, model: nn.Module, engine: Any, optimizer: AdamWEma, config: RunConfig, ranks: Ranks) -> None:
        """engine: DeepSpeed's, of the model and the optimizer."""
        self.model = model
        self.engine = engine
        self.optimizer = optimizer
        self.config = config
        self.ranks = ranks
        self._wrapper = engine.optimizer
        self._loss_scale = 1.0  # of the last backward

    @staticmethod
    @abstractmethod
    def zero_keys(config: RunConfig, elements: int) -> dict[str, Any]:
        """DeepSpeed's `zero_optimization` keys of this layout, for a model of so many elements."""

    @property
    def scaler(self) -> Any:
        """DeepSpeed's fp16 loss scaler; None in other precisions."""
        return self._wrapper.loss_scaler if self.engine.fp16_enabled() else None

    def loss_scaler(self) -> dict[str, Any]:
        """Return the fp16 loss scaler's numbers, for checkpoints; empty in other precisions."""
        numbers = {} if self.scaler is None else vars(self.scaler)
        return {key: value for key, value in numbers.items() if isinstance(value, bool | int | float)}

    def set_loss_scaler(self, numbers: Mapping[str, Any]) -> None:
        """Set numbers that `loss_scaler` returned."""
        if self.scaler is not None:
            vars(self.scaler).update(numbers)

    def step(self) -> bool:
        """Let DeepSpeed count a micro-batch, and at the last of them update; whether it updated anything."""
        self.engine.step()
        return bool(self.engine.was_step_applied())

    def close(self) -> None:
        """Free the engine, which otherwise keeps itself alive."""
        self.engine.destroy()

    def backward(self, scalar: Tensor) -> None:
        """Backpropagate through the engine, which scales the scalar in fp16 and averages gradients over the ranks."""
        self._note_loss_scale()
        # Not divided by the number of micro-batches: the loss is the whole batch's, so their gradients add up.
        self.engine.backward(scalar, scale_wrt_gas=False)

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """Return the gradients that this rank updates with: averaged over ranks, in fp16 times the loss scale."""

    def gradient_norm(self) -> Tensor:
        """Return the L2 norm of the last gradient over all parameters, before clipping: [] float32. Collective."""
        norms = torch._foreach_norm(self.gradients(), 2, dtype=torch.float32)
        squared = torch.stack(norms).square().sum().to(self.ranks.device)
        return self._sum_over_ranks(squared).sqrt() / self._loss_scale

    @abstractmethod
    def publish(self) -> None:
        """Copy the masters into the weights that the forward uses. Collective from stage 1 on."""

    @abstractmethod
    def scales(self) -> list[Tensor]:
        """Return both log-scales as the masters have them, [1] float32 each, on every rank. Collective from stage 1."""

    def whole_model(self) -> AbstractContextManager[None]:
        """Hold whole weights on every rank; inside, each rank may call the model as often as it likes. Collective."""
        return nullcontext()

    @abstractmethod
    def teacher_weights(self, teacher: nn.Module, forward: nn.Module, fragments: Sequence[Fragment]) -> TeacherWeights:
        """Lay out a teacher's weights beside the student's.

        teacher: the model, in compute precision. forward: a module that holds it and computes its features.
        fragments: of the student, with the average.
        """

    def _note_loss_scale(self) -> None:
        self._loss_scale = 1.0 if self.scaler is None else float(self.scaler.cur_scale)

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value


class Unsharded(Layout):
    """Stage 0: masters, moments, average and weights are whole on every rank."""

    def __init__(self, model: nn.Module, engine: Any, optimizer: AdamWEma, config: RunConfig, ranks: Ranks) -> None:
        super().__init__(model, engine, optimizer, config, ranks)
        engine.enable_backward_allreduce = False  # `backward` reduces the gradients itself
        self.owned = ranks.is_main
        self.masters = [list(group["params"]) for group in optimizer.param_groups]
        whole = [master for group in self.masters for master in group]
        # In low precision the masters are copies, and DeepSpeed lists the weights in the same order.
        weights = [weight for group in getattr(self._wrapper, "fp16_groups", []) for weight in group] or whole
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.placements = [
            Placement(names[id(weight)], weight, weight.shape, 0, weight.numel(), master, 0)
            for weight, master in zip(weights, whole, strict=True)
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
            self.engine.allreduce_gradients(bucket_size=self._bucket)

    @override
    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    @override
    def publish(self) -> None:
        for placement in self.placements:
            if placement.master is not placement.parameter:
                placement.parameter.copy_(placement.master)

    @override
    def scales(self) -> list[Tensor]:
        return [scale.detach() for scale in self.masters[SCALES_GROUP]]

    @override
    def teacher_weights(self, teacher: nn.Module, forward: nn.Module, fragments: Sequence[Fragment]) -> TeacherWeights:
        own = dict(teacher.named_parameters())
        if self.config.precision != "fp32":
            return CopiedTeacher(forward, [own[fragment.name].view(-1) for fragment in fragments], fragments)
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
        shards = [shard for group in self.masters for shard in group]
        # In pieces: on a CPU the squares of a tensor are added up in float32, which loses digits in large shards.
        return [piece for shard in shards if shard.grad is not None for piece in shard.grad.split(NORM_PIECE)]

    @override
    def scales(self) -> list[Tensor]:
        (shard,) = self.masters[SCALES_GROUP]
        flat = torch.empty(shard.numel() * self.ranks.world_size, device=self.ranks.device)
        all_gather_flat(flat, shard.detach().to(self.ranks.device))
        return list(flat[:2].split(1))  # the first rank's shard begins with the two scales


class ShardedStates(_Sharded):
    """Stages 1 and 2: masters, moments and average are a flat shard for each group and rank; weights are whole."""

    def __init__(self, model: nn.Module, engine: Any, optimizer: AdamWEma, config: RunConfig, ranks: Ranks) -> None:
        super().__init__(model, engine, optimizer, config, ranks)
        self._exact_on_device = config.precision == "fp32" and not config.zero.offload
        if self._exact_on_device:
            self._share_masters()
        self.masters = [[shard] for shard in self._wrapper.single_partition_of_fp32_groups]
        self.placements = list(self._placed({id(parameter): name for name, parameter in model.named_parameters()}))

    @staticmethod
    @override
    def zero_keys(config: RunConfig, elements: int) -> dict[str, Any]:
        # The host waits for DeepSpeed's norm, which clipping and offloading need. It does not wait for ours.
        return {"compute_grad_norm": config.zero.offload or config.optimizer.clip_norm is not None}

    @override
    def publish(self) -> None:
        self._wrapper.update_lp_params()

    @override
    def teacher_weights(self, teacher: nn.Module, forward: nn.Module, fragments: Sequence[Fragment]) -> TeacherWeights:
        is_average = self._exact_on_device and self.ranks.world_size == 1
        averages = [self.optimizer.state[shard]["ema"] for (shard,) in self.masters]
        flats = averages if is_average else self._empty_flats(next(teacher.parameters()).dtype)
        self._lay_into(flats, teacher)
        return TeacherWeights(forward) if is_average else GatheredTeacher(forward, flats, averages)

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
        for flat, student_flat, parameters in zip(
            flats, self._wrapper.bit16_groups_flat, self._wrapper.bit16_groups, strict=True
        ):
            for parameter in parameters:
                # The student's parameter is a view of its flat tensor: the same place serves the teacher's.
                offset = (parameter.data_ptr() - student_flat.data_ptr()) // parameter.element_size()
                own[names[id(parameter)]].data = flat.narrow(0, offset, parameter.numel()).view_as(parameter)


class ShardedWeights(_Sharded):
    """Stage 3: each parameter is cut into equal parts, one a rank; the last parts may be shorter, or all padding."""

    def __init__(self, model: nn.Module, engine: Any, optimizer: AdamWEma, config: RunConfig, ranks: Ranks) -> None:
        super().__init__(model, engine, optimizer, config, ranks)
        self.masters = [[] for _ in optimizer.param_groups]
        # A group of over 10^9 elements has several shards.
        for sub_group, shard in enumerate(self._wrapper.fp32_partitioned_groups_flat):
            self.masters[self._wrapper.sub_group_to_group_id[sub_group]].append(shard)
        self.placements = list(self._placed({id(parameter): name for name, parameter in model.named_parameters()}))

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
    def publish(self) -> None:
        self._wrapper.parameter_offload.partition_all_parameters()
        pairs = zip(self._wrapper.fp16_partitioned_groups_flat, self._wrapper.fp32_partitioned_groups_flat, strict=True)
        for weights, shard in pairs:
            weights.copy_(shard)
        if self._wrapper.persistent_parameters:  # small parameters, which stay gathered on every rank
            self._wrapper.persistent_parameters[0].all_gather(self._wrapper.persistent_parameters)

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
        own: dict[str, Any] = dict(teacher.named_parameters())  # DeepSpeed adds `ds_tensor`: this rank's part
        weights = [own[fragment.name].ds_tensor.narrow(0, 0, fragment.ema.numel()) for fragment in fragments]
        return ShardedTeacher(engine, weights, fragments, lambda: _gathered(engine))

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
"""The layout of each stage."""


def lay_out(model: nn.Module, optimizer: AdamWEma, config: RunConfig, ranks: Ranks) -> Layout:
    """Hand a model on the ranks' device to DeepSpeed; return the layout of the config's stage. Collective."""
    import deepspeed  # here, since its import takes seconds and --help should not

    kind = LAYOUTS[config.zero.stage]
    elements = sum(parameter.numel() for parameter in model.parameters())
    keys = deepspeed_config(config, ranks.world_size, elements, kind.zero_keys(config, elements))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=keys)
    return kind(model, engine, optimizer, config, ranks)
