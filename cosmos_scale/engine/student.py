"""The student inside its DeepSpeed engine: forward, backward, update, and what each rank owns of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cosmos_scale.batch import Batch, Features
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.collectives import Ranks
from cosmos_scale.engine.deepspeed_config import deepspeed_config, deepspeed_has_norm
from cosmos_scale.engine.optimizer import build_optimizer
from cosmos_scale.fragments import Fragment
from cosmos_scale.model.cosmos import CosmosModel


@dataclass(frozen=True)
class Placement:
    """Where `count` elements of a parameter, from element `start` on, lie in the fp32 master tensor `master`."""

    name: str
    parameter: nn.Parameter
    start: int
    count: int
    master: Tensor
    master_start: int


class Student:
    """The trained model; its fp32 masters, moments and the teacher's average are sharded as ZeRO's stage says."""

    def __init__(self, model: CosmosModel, teacher: Mapping[str, Tensor], config: RunConfig, ranks: Ranks) -> None:
        """Wrap a float32 model; the average starts from `teacher`, float32 parameters by name."""
        import deepspeed  # here, since it takes seconds and --help should not

        self.ranks = ranks
        self.stage = config.zero.stage
        self._deepspeed_has_norm = deepspeed_has_norm(config)
        self._norm_before_clipping = config.zero.stage == 0 and config.optimizer.clip_norm is not None
        self._norm: Tensor | None = None
        self._backward_scale = 1.0
        self.optimizer = build_optimizer(model.named_parameters(), config.optimizer, config.ema)
        # DeepSpeed makes its masters from the low-precision copy; the float32 weights are put back below.
        initial = {} if config.precision == "fp32" else _copies(model)
        self.engine, *_ = deepspeed.initialize(
            model=model.to(ranks.device),
            optimizer=self.optimizer,
            config=deepspeed_config(config, ranks.world_size),
        )
        self.model = model
        self.placements = list(self._placements())
        for group in self.optimizer.param_groups:
            for master in group["params"]:
                self.optimizer.initialise(master)
        self.fragments = [self._fragment(placement) for placement in self.placements]
        with torch.no_grad():
            for fragment in self.fragments:
                if initial:
                    fragment.weight.copy_(_slice(initial[fragment.name], fragment))
                fragment.ema.copy_(_slice(teacher[fragment.name], fragment))

    def __call__(self, batch: Batch) -> Features:
        """Normalised features of every view of this rank's batch, with a graph."""
        features: Features = self.engine(batch)
        return features

    def backward(self, surrogate: Tensor) -> None:
        """Backpropagate a [] float32 scalar through the engine, which scales it in fp16 and averages over ranks."""
        # At stage 0 DeepSpeed (0.19) divides fp16 gradients by a scale that it did not multiply the loss with.
        scaler = self._scaler() if self.stage == 0 else None
        self._backward_scale = 1.0 if scaler is None else float(scaler.cur_scale)
        self.engine.backward(surrogate * self._backward_scale)

    def update(self, *, lr: float, momentum: float, finite: Tensor) -> None:
        """AdamW, moving average and clamp; nothing changes where `finite` ([] bool, equal on all ranks) is False."""
        if self._norm_before_clipping and not self._deepspeed_has_norm:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self._norm = nn.utils.get_total_norm(gradients)
        self.optimizer.begin_step(lr=lr, momentum=momentum, skip=1.0 - finite.float())
        self.engine.step()
        # Only fp16's loss scaler drops steps; the published run moves the teacher all the same.
        if not self.engine.was_step_applied():
            self.optimizer.advance_without_update()

    def gradient_norm(self) -> Tensor:
        """[] float32 on the device: L2 norm of the last update's gradient before clipping; collective at stage 1."""
        if self._deepspeed_has_norm:
            scale = self._backward_scale if self.stage == 0 else 1.0  # where DeepSpeed tells the scaled one
            return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32) / scale
        if self._norm is not None:
            return self._norm
        squared = self.optimizer.squared_gradient_norm()
        if self.stage > 0:
            dist.all_reduce(squared)
        return squared.sqrt()

    @property
    def updates(self) -> int:
        """How many AdamW updates were done, for the bias correction; reading waits for the last one."""
        return int(self.optimizer.state[self.placements[0].master]["step"])

    @updates.setter
    def updates(self, count: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(count)

    def loss_scaler(self) -> dict[str, Any]:
        """The fp16 loss scaler's numbers, for checkpoints; empty in other precisions."""
        scaler = self._scaler()
        return {} if scaler is None else {key: value for key, value in vars(scaler).items() if _is_number(value)}

    def set_loss_scaler(self, numbers: Mapping[str, Any]) -> None:
        """Restore what `loss_scaler` returned."""
        scaler = self._scaler()
        if scaler is not None:
            vars(scaler).update(numbers)

    def weights_changed(self) -> None:
        """Copy the masters, written from outside, into the weights that the forward uses. Collective at stage 1."""
        if self.stage > 0:
            self.engine.optimizer.update_lp_params()
            return
        with torch.no_grad():
            for placement in self.placements:
                if placement.master is not placement.parameter:
                    placement.parameter.copy_(placement.master)

    def _scaler(self) -> Any:
        if not self.engine.fp16_enabled():
            return None
        wrapper = self.engine.optimizer
        return wrapper.loss_scaler if self.stage > 0 else wrapper.loss_scale_config

    def _placements(self) -> Iterator[Placement]:
        """Where DeepSpeed keeps this rank's fp32 elements of each parameter, stage by stage."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        wrapper = self.engine.optimizer
        if self.stage == 0:
            low = [p for group in getattr(wrapper, "fp16_groups", []) for p in group]
            masters = [p for group in self.optimizer.param_groups for p in group["params"]]
            for parameter, master in zip(low or masters, masters, strict=True):
                yield Placement(names[id(parameter)], parameter, 0, parameter.numel(), master, 0)
            return
        for parameters, master in zip(wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups, strict=True):
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is None:  # another rank's
                    continue
                whole, shard = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Placement(names[id(parameter)], parameter, whole.start, whole.numel, master, shard.start)

    def _fragment(self, placement: Placement) -> Fragment:
        state = self.optimizer.state[placement.master]

        def view(tensor: Tensor) -> Tensor:
            return tensor.detach().view(-1).narrow(0, placement.master_start, placement.count)

        return Fragment(
            name=placement.name,
            shape=placement.parameter.shape,
            start=placement.start,
            owned=self.stage > 0 or self.ranks.is_main,
            weight=view(placement.master),
            exp_avg=view(state["exp_avg"]),
            exp_avg_sq=view(state["exp_avg_sq"]),
            ema=view(state["ema"]),
        )


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _slice(whole: Tensor, fragment: Fragment) -> Tensor:
    return whole.detach().reshape(-1).narrow(0, fragment.start, fragment.weight.numel())


def _is_number(value: object) -> bool:
    return isinstance(value, bool | int | float)
