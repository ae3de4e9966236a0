"""The student inside its DeepSpeed engine: forward, backward, update, and what each rank owns of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_scale.batch import Batch, Features
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.accumulate import cut, join, surrogate
from cosmos_scale.engine.deepspeed_config import deepspeed_config, gradient_bucket
from cosmos_scale.engine.optimizer import SCALES_GROUP, build_optimizer
from cosmos_scale.engine.placement import Names, Placement, masters, placements, whole
from cosmos_scale.engine.ranks import Ranks, all_gather_flat
from cosmos_scale.fragments import Fragment
from cosmos_scale.model.cosmos import CosmosModel

NORM_PIECE = 2**14  # elements


class Student:
    """The trained model; its fp32 masters, moments and the teacher's average are sharded as ZeRO's stage says."""

    def __init__(self, model: CosmosModel, teacher: Mapping[str, Tensor], config: RunConfig, ranks: Ranks) -> None:
        """Wrap a float32 model; the average starts from `teacher`, float32 parameters by name."""
        import deepspeed  # here, since it takes seconds and --help should not

        self.ranks = ranks
        self.stage = config.zero.stage
        self.offload = config.zero.offload
        self.micro_batches = config.train.micro_batches
        self._loss_scale = 1.0
        self.optimizer = build_optimizer(model.named_parameters(), config.optimizer, config.ema)
        model.recompute_blocks(config.train.recompute)
        # DeepSpeed makes its masters from the low-precision copy; the float32 weights are put back below.
        initial = {} if config.precision == "fp32" else _copies(model)
        names = Names(model)
        self.elements = sum(parameter.numel() for parameter in model.parameters())
        self.engine, *_ = deepspeed.initialize(
            model=model.to(ranks.device),
            optimizer=self.optimizer,
            config=deepspeed_config(config, ranks.world_size, self.elements),
        )
        # At stage 0 `backward` reduces the gradients itself.
        self.engine.enable_backward_allreduce = self.stage > 0
        self.model = model
        if self.stage in (1, 2) and config.precision == "fp32" and not self.offload:
            self._share_masters()
        shards = masters(self.engine, self.stage, self.optimizer.param_groups)
        self.optimizer.adopt(shards)
        self.placements = list(placements(self.engine, self.stage, ranks.rank, shards, names))
        self.fragments = [self._fragment(placement) for placement in self.placements]
        with torch.no_grad():
            for fragment in self.fragments:
                if initial:
                    fragment.weight.copy_(_slice(initial[fragment.name], fragment))
                fragment.ema.copy_(_slice(teacher[fragment.name], fragment))
        # [] float32 on the device: L2 norm of the last gradient over all parameters, before clipping.
        self.gradient_norm = torch.zeros((), device=ranks.device)
        self._refresh_scales()

    def __call__(self, batch: Batch) -> Features:
        """Normalised features of every view of this rank's batch; with a graph, unless there are micro-batches."""
        if self.micro_batches > 1:
            with torch.no_grad():
                parts: list[Features] = [self.engine(part) for part in batch.split(self.micro_batches)]
            return join(parts)
        features: Features = self.engine(batch)
        return features

    def with_full_scales(self, features: Features) -> Features:
        """The same features with the fp32 log-scales, which bf16 would round by up to a percent."""
        return features._replace(logit_scale=self._scales[0], distill_logit_scale=self._scales[1])

    def backward(self, batch: Batch, features: Features, gradients: Features) -> None:
        """Backpropagate the loss's gradients with respect to the features that this returned for this batch."""
        if self.micro_batches == 1:
            self._backward(surrogate(features, gradients))
            return
        parts = zip(batch.split(self.micro_batches), cut(gradients, self.micro_batches), strict=True)
        for number, (part, part_gradients) in enumerate(parts, start=1):
            self._backward(surrogate(self.engine(part), part_gradients))
            if number < self.micro_batches:
                self.engine.step()  # updates nothing yet: it counts the micro-batches

    def _backward(self, scalar: Tensor) -> None:
        """Backpropagate through the engine, which scales the scalar in fp16 and averages gradients over ranks."""
        scaler = self._scaler()
        self._loss_scale = 1.0 if scaler is None else float(scaler.cur_scale)
        # At stage 0 DeepSpeed (0.19) divides fp16 gradients by a scale that it did not multiply the loss with.
        # Gradients of micro-batches add up: the loss was that of the whole batch.
        self.engine.backward(scalar * self._loss_scale if self.stage == 0 else scalar, scale_wrt_gas=False)
        # Left to itself, DeepSpeed reduces them through a second copy of them all, one process too.
        if self.stage == 0 and self.ranks.world_size > 1 and self.engine.is_gradient_accumulation_boundary():
            self.engine.allreduce_gradients(bucket_size=gradient_bucket(self.elements))

    def update(self, *, lr: float, momentum: float, finite: Tensor) -> Tensor:
        """AdamW, moving average and clamp; nothing changes where loss or gradient are not finite. Collective.

        finite: [] bool, equal on all ranks: whether the loss is. Returns the same and whether the gradient is; in fp16,
        where the loss scaler drops updates whose scaled gradient is not finite, only the former.
        """
        self.gradient_norm = self._measure_norm()
        if self._scaler() is None:
            finite = finite & self.gradient_norm.isfinite()
        self.optimizer.begin_step(lr=lr, momentum=momentum, skip=1.0 - finite.float())
        self.engine.step()
        # Only fp16's loss scaler drops steps; the published run moves the teacher all the same.
        if not self.engine.was_step_applied():
            self.optimizer.advance_without_update()
        self._refresh_scales()
        return finite

    @property
    def updates(self) -> int:
        """How many AdamW updates were done, for the bias correction; reading waits for the last one."""
        return int(self.optimizer.updates)

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

    @torch.no_grad()
    def weights_changed(self) -> None:
        """Copy the masters, written from outside, into the weights that the forward uses; collective from stage 1."""
        wrapper = self.engine.optimizer
        if self.stage == 0:
            for placement in self.placements:
                if placement.master is not placement.parameter:
                    placement.parameter.copy_(placement.master)
        elif self.stage < 3:
            wrapper.update_lp_params()
        else:
            wrapper.parameter_offload.partition_all_parameters()
            for weights, shard in zip(
                wrapper.fp16_partitioned_groups_flat, wrapper.fp32_partitioned_groups_flat, strict=True
            ):
                weights.copy_(shard)
            if wrapper.persistent_parameters:  # small ones, which stay gathered
                wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
        self._refresh_scales()

    @contextmanager
    def whole_model(self) -> Iterator[CosmosModel]:
        """The model with whole weights, to be called by each rank as often as it likes. Collective at stage 3."""
        with whole(self.engine if self.stage == 3 else None):
            yield self.model

    def _share_masters(self) -> None:
        """Let fp32 masters be this rank's part of the weights, which are fp32 too: DeepSpeed makes a copy of them."""
        wrapper = self.engine.optimizer
        for parts, master in zip(
            wrapper.parallel_partitioned_bit16_groups, wrapper.single_partition_of_fp32_groups, strict=True
        ):
            master.data = parts[self.ranks.rank].detach()
        wrapper._link_all_hp_params()  # to the new memory; it would keep the old

    def _measure_norm(self) -> Tensor:
        wrapper = self.engine.optimizer
        if self.offload:  # on the CPU, in the masters' gradients
            if self.ranks.device.type == "cuda":
                torch.cuda.synchronize(self.ranks.device)  # DeepSpeed (0.19) waits for the copies in its step only
            shards = [shard for group in self.optimizer.shards for shard in group]
            # In pieces: a CPU adds up all squares of a tensor in float32, and loses digits in those of large shards.
            gradients = [piece for shard in shards if shard.grad is not None for piece in shard.grad.split(NORM_PIECE)]
        elif self.stage > 0:  # this rank's share of the averaged gradients
            gradients = [gradient for group in wrapper.averaged_gradients.values() for gradient in group]
        else:
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        squared = torch.stack(norms).square().sum().to(self.ranks.device)
        if self.stage > 0:
            dist.all_reduce(squared)
        return squared.sqrt() / self._loss_scale

    @torch.no_grad()
    def _refresh_scales(self) -> None:
        """Bring the fp32 log-scales, [1] each, to every rank: from stage 1 on the first rank holds them."""
        shards = self.optimizer.shards[SCALES_GROUP]
        if self.stage == 0:
            self._scales = [scale.detach() for scale in shards]
            return
        (shard,) = shards
        flat = torch.empty(shard.numel() * self.ranks.world_size, device=self.ranks.device)
        all_gather_flat(flat, shard.detach().to(self.ranks.device))
        self._scales = list(flat[:2].split(1))

    def _scaler(self) -> Any:
        if not self.engine.fp16_enabled():
            return None
        wrapper = self.engine.optimizer
        return wrapper.loss_scaler if self.stage > 0 else wrapper.loss_scale_config

    def _fragment(self, placement: Placement) -> Fragment:
        state = self.optimizer.state[placement.master]

        def view(tensor: Tensor) -> Tensor:
            return tensor.detach().view(-1).narrow(0, placement.master_start, placement.count)

        return Fragment(
            name=placement.name,
            shape=placement.shape,
            start=placement.start,
            owned=self.stage > 0 or self.ranks.is_main,
            weight=view(placement.master),
            exp_avg=view(state["exp_avg"]),
            exp_avg_sq=view(state["exp_avg_sq"]),
            ema=view(state["ema"]),
        )


def _copies(model: CosmosModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _slice(whole: Tensor, fragment: Fragment) -> Tensor:
    return whole.detach().reshape(-1).narrow(0, fragment.start, fragment.weight.numel())


def _is_number(value: object) -> bool:
    return isinstance(value, bool | int | float)
