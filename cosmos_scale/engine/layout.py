"""What a rank holds of a student inside its DeepSpeed engine, whatever the stage of ZeRO; zero.py has the stages."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Size, Tensor, nn

from cosmos_scale.config import RunConfig
from cosmos_scale.engine.optimizer import AdamWEma
from cosmos_scale.engine.ranks import Ranks
from cosmos_scale.engine.teacher_weights import TeacherWeights
from cosmos_scale.fragments import Fragment
from cosmos_scale.kernels.adamw_ema import squared_norm
from cosmos_scale.model.cosmos import CosmosModel


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
    rank saves the same elements. weights_stay: whether whole weights lie in the same memory at every step.
    sharded: whether ranks have different masters.
    """

    masters: list[list[Tensor]]
    placements: list[Placement]
    owned = True
    weights_stay = True
    sharded = True

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

    @staticmethod
    def optimizer_groups(groups: list[dict[str, Any]], model: CosmosModel, world_size: int) -> list[dict[str, Any]]:
        """Return the groups of the model's parameters that DeepSpeed gets, made of the optimizer's."""
        return groups

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

    @property
    def updates_itself(self) -> bool:
        """Whether updates are made without DeepSpeed's step: it keeps the fp16 loss scaler, and the way to the host."""
        return self.config.precision != "fp16" and not self.config.zero.offload

    def step(self) -> bool:
        """Count a micro-batch, and at the last of them update; whether anything was updated."""
        if not (self.updates_itself and self.engine.is_gradient_accumulation_boundary()):
            self.engine.step()
            return bool(self.engine.was_step_applied())
        # DeepSpeed's step would copy gradients to fp32 and masters to the weights, and make the host wait.
        self.optimizer.step_shards(self._take_gradients())
        self._share_weights()
        self.engine.micro_steps += 1
        return True

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
        squared = squared_norm(self.gradients(), triton=self.optimizer.triton).to(self.ranks.device)
        return self._sum_over_ranks(squared).sqrt() / self._loss_scale

    def clip_factor(self, norm: Tensor) -> Tensor | None:
        """Return what the gradients are to be multiplied by; None where they are not clipped, or DeepSpeed clips."""
        clip_norm = self.config.optimizer.clip_norm
        if clip_norm is None or (not self.updates_itself and self.engine.gradient_clipping() > 0.0):
            return None
        return (clip_norm / (norm + 1e-6)).clamp(max=1.0)  # DeepSpeed's formula

    @abstractmethod
    def _take_gradients(self) -> list[list[Tensor]]:
        """Return a gradient for each master, and leave none behind in DeepSpeed."""

    @abstractmethod
    def _share_weights(self) -> None:
        """Bring the weights that other ranks updated. Collective from stage 1 on."""

    @abstractmethod
    def publish(self) -> None:
        """Copy the masters into the weights that the forward uses. Collective from stage 1 on."""

    def whole_model(self) -> AbstractContextManager[None]:
        """Hold whole weights on every rank; inside, each rank may call the model as often as it likes. Collective."""
        return nullcontext()

    @abstractmethod
    def teacher_weights(self, teacher: nn.Module, forward: nn.Module, fragments: Sequence[Fragment]) -> TeacherWeights:
        """Lay out a teacher's weights beside the student's.

        teacher: the model, in compute precision. forward: a module that holds it and computes its features.
        fragments: of the student, with the average.
        """

    def _copies_and_averages(self) -> tuple[list[Tensor], list[Tensor]]:
        copies = [copy for group in self.optimizer.average_copies for copy in group]
        return copies, [self.optimizer.state[master]["ema"] for group in self.masters for master in group]

    def _note_loss_scale(self) -> None:
        self._loss_scale = 1.0 if self.scaler is None else float(self.scaler.cur_scale)

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value
