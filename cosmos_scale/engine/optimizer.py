"""The optimizer handed to DeepSpeed: AdamW, the teacher's moving average and the clamp of the scales in one step."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cosmos_scale.config import EmaConfig, OptimizerConfig
from cosmos_scale.kernels import adamw_ema
from cosmos_scale.model.cosmos import parameter_decays

SCALE_RANGE = (0.0, math.log(100.0))
SCALES_GROUP = 2  # of the optimizer's groups


class _UnderWay(NamedTuple):
    """What the update under way was asked for."""

    momentum: float
    skip: Tensor


class AdamWEma(torch.optim.Optimizer):
    """AdamW whose state also holds the fp32 moving average of each parameter (key "ema").

    DeepSpeed replaces the parameters of the groups by the fp32 tensors that it owns (from stage 1 on flat shards), so
    the average is sharded as the masters are, and its update issues no collective. A group with "clamp" keeps its
    parameters in that range after each update, on the masters, before DeepSpeed copies them out.
    `adopt` takes over those tensors. `update` is the only way to an update: DeepSpeed calls `step` inside of it, once,
    or at stage 3, where groups are empty at other times, once for each shard.
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
        self._under_way: _UnderWay | None = None

    def update(self, step: Callable[[], bool], *, lr: float, momentum: float, skip: Tensor) -> None:
        """Let DeepSpeed do one update.

        step: calls `DeepSpeedEngine.step`, and says whether DeepSpeed updated anything. Where its loss scaler drops
        the update, only the AdamW update is lost: the averages move and the clamp holds, as in the published run.
        lr: learning rate. momentum: of the average. skip: [] float32, 0, or 1 where nothing is to change.
        """
        for group in self.param_groups:
            group["lr"] = lr
        # Offloaded states lie on the CPU: then the host waits for the flag, as for the gradients.
        self._under_way = _UnderWay(momentum, skip.to(self.shards[0][0].device))
        try:
            if not step():
                self._move_averages(self._under_way)
        finally:
            self._under_way = None

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

    def set_updates(self, count: int) -> None:
        """Say how many AdamW updates were done."""
        for state in self.state.values():
            state["step"].fill_(count)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the groups in place from their gradients; parameters without one count as having a zero gradient."""
        assert closure is None, "DeepSpeed calls step without a closure"
        under_way = self._under_way
        if under_way is None:
            # At stage 0 DeepSpeed's low-precision wrapper makes a trial step with zero gradients, as it is made.
            assert not self.shards, "`update` is the way to an update"
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
                momentum=under_way.momentum,
                average_first=self.order == "before_step",
                skip=under_way.skip,
            )
            self._clamp(group, parameters)

    @torch.no_grad()
    def _move_averages(self, under_way: "_UnderWay") -> None:
        for group, shards in zip(self.param_groups, self.shards, strict=True):
            averages = [self.state[shard]["ema"] for shard in shards]
            adamw_ema.average_(averages, [shard.detach() for shard in shards], under_way.momentum, under_way.skip)
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
