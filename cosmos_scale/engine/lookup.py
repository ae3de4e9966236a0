"""A table's backward at stage 3: the gradient of a lookup needs the ids and the table's shape, and no weight."""

from typing import Any

import torch
from torch import Tensor, nn


def leave_tables_ungathered(model: nn.Module) -> None:
    """Let the tables' backward do without their weights, which DeepSpeed (0.19) gathers for every module's backward.

    To be called once DeepSpeed has taken the model over, before the first step.
    """
    for table in model.modules():
        if isinstance(table, nn.Embedding):
            table.pre_bwd_fn = _BeforeBackward(table)  # type: ignore[assignment]  # DeepSpeed applies it to the output
            table.weight.register_post_accumulate_grad_hook(_give_back)


class _BeforeBackward:
    """What runs before the table's backward, in place of DeepSpeed's function."""

    def __init__(self, table: nn.Embedding) -> None:
        self._table = table

    def apply(self, output: Tensor) -> Tensor:
        """Return a table's output, whose backward passes here."""
        passed: Tensor = _Shaped.apply(output, self._table)
        return passed


class _Shaped(torch.autograd.Function):
    """Gives a weight without elements its shape, which torch asks of a parameter whose gradient arrives."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, table: nn.Embedding) -> Tensor:
        ctx.table = table
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        table = ctx.table
        if not table.weight.numel():
            one = table.weight.new_zeros(())  # which is read nowhere
            table.weight.data = one.expand(table.num_embeddings, table.embedding_dim)
        return gradient, None


def _give_back(weight: Tensor) -> None:
    """Take the shape away again, after DeepSpeed has taken the gradient."""
    if weight.stride() == (0, 0):
        weight.data = weight.new_empty(0)
