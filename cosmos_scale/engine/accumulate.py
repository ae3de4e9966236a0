"""Gradient accumulation that is right for a contrastive loss: one loss, computed once, over the whole batch.

With k micro-batches a step has three parts. First the features of all micro-batches are computed without a graph. Then
the loss and its gradients with respect to the features are computed from all features. Last, each micro-batch is
computed again and backpropagates its part of these gradients (Gao et al. 2021, "Scaling deep contrastive learning batch
size under memory limited setup", section 3.2). So k micro-batches give the gradient of one batch that is k times as
large. The sum of k small losses would lack the negatives between micro-batches.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cosmos_scale.batch import Features, TeacherFeatures

Views = TypeVar("Views", Features, TeacherFeatures)


def join(parts: Sequence[Views]) -> Views:
    """Put the features of micro-batches together along the samples; scales are the same in all parts.

    A single part comes back as it is.
    """
    if len(parts) == 1:
        return parts[0]
    joined = [torch.cat(tensors, dim=1) if tensors[0].ndim == 3 else tensors[0] for tensors in zip(*parts, strict=True)]
    return type(parts[0])(*joined)


def cut(gradients: Features, parts: int) -> list[Features]:
    """Cut gradients along the samples; the scales' whole gradients go to the first part, so that they count once."""
    views = [tensor.chunk(parts, dim=1) for tensor in gradients[:4]]
    scales = gradients[4:]
    rest = [torch.zeros_like(scale) for scale in scales]
    return [Features(*(view[part] for view in views), *(rest if part else scales)) for part in range(parts)]


def surrogate(features: Features, gradients: Features) -> Tensor:
    """Return 0, [] float32, whose gradient by the features is `gradients`: the engine backpropagates scalars only."""
    zero: Tensor = _Surrogate.apply(gradients, *features)
    return zero


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Features, *features: Tensor) -> Tensor:
        ctx.gradients, ctx.dtypes = gradients, [feature.dtype for feature in features]
        return torch.zeros((), device=features[0].device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        scaled = torch._foreach_mul(ctx.gradients, factor)
        by_features = [torch.empty_like(part, dtype=dtype) for part, dtype in zip(scaled, ctx.dtypes, strict=True)]
        torch._foreach_copy_(by_features, scaled)
        return None, *by_features
