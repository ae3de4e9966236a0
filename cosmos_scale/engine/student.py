"""The student inside its DeepSpeed engine: forward, backward, update, and what each rank owns of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosmos_scale.batch import Batch, Features
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.accumulate import cut, join, surrogate
from cosmos_scale.engine.full_values import FullValues
from cosmos_scale.engine.layout import Placement
from cosmos_scale.engine.optimizer import build_optimizer
from cosmos_scale.engine.ranks import Ranks
from cosmos_scale.engine.zero import lay_out
from cosmos_scale.fragments import Fragment
from cosmos_scale.model.cosmos import LOG_SCALES, CosmosModel

NORM_PARTS = ("weight", "bias")


class Update(NamedTuple):
    """What became of an update, on the device.

    finite: [] bool, equal on all ranks: whether the loss and its gradient are finite (in fp16 the loss alone); where
    they are not, nothing changed.
    gradient_norm: [] float32, the L2 norm of the gradient over all parameters, before clipping.
    """

    finite: Tensor
    gradient_norm: Tensor


class Student:
    """The trained model.

    layout: how its fp32 masters, moments and the teacher's average lie on the ranks. full_values: what the forward, the
    loss and the teacher read of masters and averages in float32; up to date after each update and `publish`.
    """

    def __init__(self, model: CosmosModel, teacher: Mapping[str, Tensor], config: RunConfig, ranks: Ranks) -> None:
        """Wrap a float32 model; the average starts from `teacher`, float32 parameters by name."""
        self.ranks = ranks
        self.micro_batches = config.train.micro_batches
        self.optimizer = build_optimizer(
            model.named_parameters(), config.optimizer, config.ema, triton=config.kernels == "auto"
        )
        model.recompute_blocks(config.train.recompute)
        # DeepSpeed makes its masters from low-precision weights. The loop below puts the float32 weights into them.
        exact = {} if config.precision == "fp32" else _copies(model)
        self.model = model
        self.layout = lay_out(model.to(ranks.device), self.optimizer, config, ranks)
        self._forward = self.layout.engine
        self.optimizer.adopt(self.layout.masters)
        self.fragments = [self._fragment(placement) for placement in self.layout.placements]
        with torch.no_grad():
            for fragment in self.fragments:
                if exact:
                    fragment.weight.copy_(_slice(exact[fragment.name], fragment))
                fragment.ema.copy_(_slice(teacher[fragment.name], fragment))
        norms = {} if config.precision == "fp32" else _norm_sizes(model)
        self.full_values = FullValues(
            self.fragments, norms | dict.fromkeys(LOG_SCALES, 1), norms, ranks, sharded=self.layout.sharded
        )
        if norms:
            model.read_norms(self.full_values.masters)

    def __call__(self, batch: Batch) -> Features:
        """Return the normalised features of every view of this rank's batch; with a graph if it is one micro-batch."""
        if self.micro_batches > 1:
            with torch.no_grad():
                parts: list[Features] = [self._forward(part) for part in batch.split(self.micro_batches)]
            return join(parts)
        features: Features = self._forward(batch)
        return features

    def with_full_scales(self, features: Features) -> Features:
        """Return the features with the masters' fp32 log-scales: bf16 would round a scale by up to a percent."""
        return features._replace(**{name: self.full_values.masters[name] for name in LOG_SCALES})

    def backward(self, batch: Batch, features: Features, gradients: Features) -> None:
        """Backpropagate the loss's gradients with respect to `features`, which this student returned for `batch`."""
        if self.micro_batches == 1:
            self.layout.backward(surrogate(features, gradients))
            return
        parts = zip(batch.split(self.micro_batches), cut(gradients, self.micro_batches), strict=True)
        for number, (part, part_gradients) in enumerate(parts, start=1):
            self.layout.backward(surrogate(self._forward(part), part_gradients))
            if number < self.micro_batches:
                self.layout.step()  # updates nothing yet: DeepSpeed counts the micro-batches

    @torch.no_grad()
    def update(self, *, lr: float, momentum: float, finite: Tensor) -> Update:
        """Update by AdamW, average and clamp; nothing changes where loss or gradient is not finite. Collective.

        finite: [] bool, equal on all ranks: whether the loss is finite. In fp16 the gradient does not count, since the
        loss scaler drops the AdamW update where the scaled gradient is not finite.
        """
        norm = self.layout.gradient_norm()
        if self.layout.scaler is None:
            finite = finite & norm.isfinite()
        self.optimizer.update(
            self.layout.step,
            lr=lr,
            momentum=momentum,
            skip=1.0 - finite.float(),
            gradient_factor=self.layout.clip_factor(norm),
        )
        self.full_values.refresh()
        return Update(finite, norm)

    @property
    def updates(self) -> int:
        """How many AdamW updates were done, for the bias correction; reading waits for the last of them."""
        return int(self.optimizer.updates)

    def go_on(self, *, updates: int, loss_scaler: Mapping[str, Any]) -> None:
        """Go on from a checkpoint whose tensors are in the fragments already. Collective."""
        self.optimizer.set_updates(updates)
        self.layout.set_loss_scaler(loss_scaler)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy masters that were changed from outside into the weights of the forward. Collective from stage 1 on."""
        self.layout.publish()
        self.full_values.refresh()

    @contextmanager
    def whole_model(self) -> Iterator[CosmosModel]:
        """Yield the model with whole weights; each rank may call it as often as it likes. Collective at stage 3."""
        with self.layout.whole_model():
            yield self.model

    def _fragment(self, placement: Placement) -> Fragment:
        state = self.optimizer.state[placement.master]

        def view(tensor: Tensor) -> Tensor:
            return tensor.detach().view(-1).narrow(0, placement.master_start, placement.count)

        return Fragment(
            name=placement.name,
            shape=placement.shape,
            start=placement.start,
            owned=self.layout.owned,
            weight=view(placement.master),
            exp_avg=view(state["exp_avg"]),
            exp_avg_sq=view(state["exp_avg_sq"]),
            ema=view(state["ema"]),
        )


def _norm_sizes(model: CosmosModel) -> dict[str, int]:
    """Return the elements of each gain and offset of the norms, by parameter name."""
    return {f"{name}.{part}": norm.normalized_shape[0] for name, norm in model.norms().items() for part in NORM_PARTS}


def _copies(model: CosmosModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _slice(whole: Tensor, fragment: Fragment) -> Tensor:
    return whole.detach().reshape(-1).narrow(0, fragment.start, fragment.weight.numel())
