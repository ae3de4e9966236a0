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
SCALES_GROUP = -1  # the log-scales' place among the optimizer's groups


class _UnderWay(NamedTuple):
    """The arguments of the update under way."""

    momentum: float
    skip: Tensor


class AdamWEma(torch.optim.Optimizer):
    """AdamW whose state also holds the fp32 moving average of each parameter (key "ema").

    DeepSpeed replaces the parameters of the groups by the fp32 tensors that it owns: the masters, which are flat shards
    from stage 1 on. `adopt` takes over the masters. So the average is sharded like the masters, and its update needs no
    collective. A group with "clamp" keeps its masters in that range after each update, before DeepSpeed copies them
    into the weights.
    `update` is the only way to an update. Inside `update` DeepSpeed calls `step` once at stage 0, once for each group
    at stages 1 and 2, and once for each shard at stage 3. It hides or empties the other groups during such a call.
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

        step: calls `DeepSpeedEngine.step`, and returns whether DeepSpeed updated anything. Where DeepSpeed's loss
        scaler drops the update, only AdamW's part is lost: the averages still move and the clamp still holds, as in the
        published run. lr: learning rate. momentum: of the average. skip: [] float32, 0, or 1 where nothing is to
        change.
        """
        for group in self.param_groups:
            group["lr"] = lr
        # Offloaded states lie on the CPU. Then the host waits for the flag, as it waits for the gradients.
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
        # All shards have the same count, a shard that is all padding too.
        done: Tensor = self.state[self.shards[0][0]]["step"]
        return done

    def set_updates(self, count: int) -> None:
        """Set how many AdamW updates were done, for the bias correction."""
        for state in self.state.values():
            state["step"].fill_(count)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the groups in place from their gradients; a parameter without a gradient has a zero gradient."""
        assert closure is None, "DeepSpeed calls step without a closure"
        under_way = self._under_way
        if under_way is None:
            # At stage 0 the constructor of DeepSpeed's low-precision wrapper makes a trial step with zero gradients.
            assert not self.shards, "`update` is the way to an update"
            return
        for group in self.param_groups:
            parameters = group["params"]
            if not parameters:  # at stage 3: the group's turn comes in another call
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
    """Build the optimizer with three groups: weight decay, no weight decay, and the log-scales, which are clamped."""
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
