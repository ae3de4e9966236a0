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


class _UnderWay(NamedTuple):
    """The arguments of the update under way. gradients: of `step_shards`."""

    momentum: float
    skip: Tensor
    gradient_factor: Tensor | None
    gradients: list[list[Tensor]] | None = None


class AdamWEma(torch.optim.Optimizer):
    """AdamW whose state also holds the fp32 moving average of each parameter (key "ema").

    DeepSpeed replaces the parameters of the groups by the fp32 tensors that it owns: the masters, which are flat shards
    from stage 1 on. `adopt` takes over the masters. So the average is sharded like the masters, and its update needs no
    collective. A group with "clamp" keeps its masters in that range after each update, before DeepSpeed copies them
    into the weights.
    `update` is the only way to an update. Inside `update` either `step_shards` does it all at once. Or DeepSpeed calls
    `step`: once at stage 0, once for each group at stages 1 and 2, and once for each shard at stage 3. It hides or
    empties the other groups during such a call.

    weight_copies, average_copies: of each group, tensors of the shards' sizes that `step_shards` copies the weights and
    the averages into; in a dtype of their own. Where DeepSpeed calls `step`, nothing is copied: DeepSpeed copies the
    weights itself.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        order: Literal["before_step", "after_step"],
        triton: bool,
    ) -> None:
        """triton: whether the project's Triton kernel may serve."""
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "clamp": None})
        self.betas = betas
        self.eps = eps
        self.order = order
        self.triton = triton
        self.shards: list[list[Tensor]] = []
        self.weight_copies: list[list[Tensor]] = []
        self.average_copies: list[list[Tensor]] = []
        self._averages_copied = False
        self._under_way: _UnderWay | None = None

    def update(
        self,
        step: Callable[[], bool],
        *,
        lr: float,
        momentum: float,
        skip: Tensor,
        gradient_factor: Tensor | None = None,
    ) -> None:
        """Do one update.

        step: calls `step_shards`, or `DeepSpeedEngine.step`; returns whether anything was updated. Where DeepSpeed's
        loss scaler drops the update, only AdamW's part is lost: the averages still move and the clamp still holds, as
        in the published run. lr: learning rate. momentum: of the average. skip: [] float32, 0, or 1 where nothing is to
        change. gradient_factor: [] float32, which the gradients are to be multiplied by.
        """
        self._averages_copied = False
        for group in self.param_groups:
            group["lr"] = lr
        # Offloaded states lie on the CPU. Then the host waits for the flag, as it waits for the gradients.
        self._under_way = _UnderWay(momentum, skip.to(self.shards[0][0].device), gradient_factor)
        try:
            if not step():
                self._move_averages(self._under_way)
        finally:
            self._under_way = None

    def step_shards(self, gradients: list[list[Tensor]]) -> None:
        """Update all groups and write the copies; to be called inside `update`, in DeepSpeed's place.

        gradients: a tensor for each shard, of any floating dtype; they are not kept.
        """
        assert self._under_way is not None, "`update` is the way to an update"
        self._under_way = self._under_way._replace(gradients=gradients)
        self.step()
        self._averages_copied = bool(self.average_copies)

    def take_averages_copied(self) -> bool:
        """Tell whether the copies of the averages hold what the last update left; only the first answer may be yes.

        Who asks later may ask since the averages were changed from outside.
        """
        copied, self._averages_copied = self._averages_copied, False
        return copied

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
        if under_way.gradients is not None:
            none: list[list[Tensor]] = [[] for _ in self.shards]
            lists = (self.shards, under_way.gradients, self.weight_copies or none, self.average_copies or none)
            # Groups with the same options are updated at once.
            for places in self._alike():
                merged = [[tensor for place in places for tensor in groups[place]] for groups in lists]
                self._update_group(under_way, self.param_groups[places[0]], *merged)
            return
        for group in self.param_groups:
            parameters = group["params"]
            if not parameters:  # at stage 3: the group's turn comes in another call
                continue
            gradients = [
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters
            ]
            self._update_group(under_way, group, parameters, gradients, [], [])

    def _alike(self) -> list[list[int]]:
        """Return the places of the groups, those with the same options together."""
        alike: dict[tuple[float, tuple[float, float] | None], list[int]] = {}
        for place, group in enumerate(self.param_groups):
            alike.setdefault((group["weight_decay"], group["clamp"]), []).append(place)
        return list(alike.values())

    def _update_group(
        self,
        under_way: _UnderWay,
        group: dict[str, Any],
        shards: list[Tensor],
        gradients: list[Tensor],
        weight_copies: list[Tensor],
        average_copies: list[Tensor],
    ) -> None:
        states = [self.state[shard] for shard in shards]
        adamw_ema.adamw_ema_(
            [shard.detach() for shard in shards],
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
            gradient_factor=under_way.gradient_factor,
            clamp=group["clamp"],
            weight_copies=[copy.detach() for copy in weight_copies],
            average_copies=average_copies,
            triton=self.triton,
        )

    @torch.no_grad()
    def _move_averages(self, under_way: "_UnderWay") -> None:
        for group, shards in zip(self.param_groups, self.shards, strict=True):
            averages = [self.state[shard]["ema"] for shard in shards]
            weights = [shard.detach() for shard in shards]
            adamw_ema.average_(averages, weights, under_way.momentum, under_way.skip)
            if group["clamp"] is not None:
                adamw_ema.clamp_(weights, *group["clamp"])


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], optimizer: OptimizerConfig, ema: EmaConfig, *, triton: bool = True
) -> AdamWEma:
    """Build the optimizer with three groups: weight decay, no weight decay, and the log-scales, which are clamped.

    triton: whether the project's Triton kernel may serve.
    """
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
    return AdamWEma(groups, betas=optimizer.betas, eps=optimizer.eps, order=ema.order, triton=triton)
