"""The optimizer handed to DeepSpeed: AdamW, the teacher's moving average and the clamp of the scales in one step."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cosmos_scale.config import EmaConfig, OptimizerConfig
from cosmos_scale.kernels import adamw_ema
from cosmos_scale.model.cosmos import parameter_decays

SCALE_RANGE = (0.0, math.log(100.0))
SCALES_GROUP = 2  # of the optimizer's groups


class AdamWEma(torch.optim.Optimizer):
    """AdamW whose state also holds the fp32 moving average of each parameter (key "ema").

    DeepSpeed replaces the parameters of the groups by the fp32 tensors it owns (from stage 1 on flat shards), so the
    average is sharded as the masters are and its update issues no collective. A group with "clamp" keeps its
    parameters in that range after each update, on the masters, before DeepSpeed copies them out.
    `adopt` takes over those tensors. `begin_step` says what the next `step` does; DeepSpeed calls `step` once, or at
    stage 3, where groups are empty at other times, once for each shard.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        order: Literal["before_step", "after_step"],
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "clamp": None})
        self.betas = betas
        self.eps = eps
        self.order = order
        self.shards: list[list[Tensor]] = []
        self._momentum = 1.0
        self._skip: Tensor | None = None

    def begin_step(self, *, lr: float, momentum: float, skip: Tensor) -> None:
        """Set the learning rate, the average's momentum and the skip flag ([] float32, 0 or 1) of the next update."""
        for group in self.param_groups:
            group["lr"] = lr
        self._momentum = momentum
        # Offloaded states lie on the CPU: then the host waits for the flag, as it does for the gradients.
        self._skip = skip.to(self.shards[0][0].device)

    def adopt(self, shards: list[list[Tensor]]) -> None:
        """Take over the fp32 tensors of each group, with zero moments and averages equal to the tensors."""
        self.shards = shards
        for shard in (shard for group in shards for shard in group):
            state = self.state[shard]
            state["exp_avg"] = torch.zeros_like(shard, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(shard, requires_grad=False)
            state["ema"] = shard.detach().clone()
            state["step"] = torch.zeros((), dtype=torch.float32, device=shard.device)

    @property
    def updates(self) -> Tensor:
        """[] float32 on the states' device: the AdamW updates done."""
        # Any shard's: a rank's own may be all padding.
        done: Tensor = self.state[self.shards[0][0]]["step"]
        return done

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the groups in place from their gradients; parameters without one count as having a zero gradient."""
        assert closure is None, "DeepSpeed calls step without a closure"
        if self._skip is None:  # at stage 0 DeepSpeed's low-precision wrapper makes a trial step with zero gradients
            return
        for group in self.param_groups:
            parameters = group["params"]
            if not parameters:  # at stage 3 its turn comes in another call
                continue
            gradients = [
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters
            ]
            states = [self.state[parameter] for parameter in parameters]
            adamw_ema.adamw_ema_(
                [parameter.detach() for parameter in parameters],
                gradients,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["ema"] for state in states],
                [state["step"] for state in states],
                lr=group["lr"],
                betas=self.betas,
                eps=self.eps,
                weight_decay=group["weight_decay"],
                momentum=self._momentum,
                average_first=self.order == "before_step",
                skip=self._skip,
            )
            self._clamp(group, parameters)

    @torch.no_grad()
    def advance_without_update(self) -> None:
        """Move averages and clamp where the loss scaler dropped the update: only the AdamW update is lost."""
        assert self._skip is not None, "begin_step comes first"
        for group, shards in zip(self.param_groups, self.shards, strict=True):
            averages = [self.state[shard]["ema"] for shard in shards]
            adamw_ema.average_(averages, [shard.detach() for shard in shards], self._momentum, self._skip)
            self._clamp(group, shards)

    def _clamp(self, group: dict[str, Any], shards: list[Tensor]) -> None:
        # The averages stay in range by themselves: they are convex mixtures of clamped values.
        if group["clamp"] is not None:
            adamw_ema.clamp_([shard.detach() for shard in shards], *group["clamp"])


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], optimizer: OptimizerConfig, ema: EmaConfig
) -> AdamWEma:
    """Group named parameters into decayed, not decayed and the clamped log-scales, in their order."""
    named = list(parameters)
    scales = [parameter for name, parameter in named if name.endswith("logit_scale")]
    towers = [(name, parameter) for name, parameter in named if not name.endswith("logit_scale")]
    decayed = [parameter for name, parameter in towers if parameter_decays(name, parameter)]
    plain = [parameter for name, parameter in towers if not parameter_decays(name, parameter)]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": optimizer.weight_decay},
        {"params": plain},
        {"params": scales, "clamp": SCALE_RANGE},
    ]
    return AdamWEma(groups, betas=optimizer.betas, eps=optimizer.eps, order=ema.order)
