"""Gradient accumulation that is right for a contrastive loss: the loss is one of the whole batch, computed once.

With k micro-batches the features of all of them are computed without a graph, the loss and its gradients with respect
to the features from all of these, and then each micro-batch is computed again and backpropagates its part (Gao et al.
2021, "Scaling deep contrastive learning batch size under memory limited setup", section 3.2). So k micro-batches give
the gradient of one batch k times as large, where summing k small losses would leave out the negatives among them.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from cosmos_scale.batch import Features, TeacherFeatures

Views = TypeVar("Views", Features, TeacherFeatures)


def join(parts: Sequence[Views]) -> Views:
    """Put the features of micro-batches together along the samples; scales are the same in all parts."""
    joined = [torch.cat(tensors, dim=1) if tensors[0].ndim == 3 else tensors[0] for tensors in zip(*parts, strict=True)]
    return type(parts[0])(*joined)


def cut(gradients: Features, parts: int) -> list[Features]:
    """Cut gradients along the samples; the scales' whole gradients go to the first part, so that they count once."""
    views = [tensor.chunk(parts, dim=1) for tensor in gradients[:4]]
    scales = gradients[4:]
    rest = [torch.zeros_like(scale) for scale in scales]
    return [Features(*(view[part] for view in views), *(rest if part else scales)) for part in range(parts)]


def surrogate(features: Features, gradients: Features) -> Tensor:
    """[] float32 whose gradient with respect to the features is `gradients`, for an engine that wants a scalar."""
    products = [(feature.float() * gradient).sum() for feature, gradient in zip(features, gradients, strict=True)]
    return torch.stack(products).sum()
