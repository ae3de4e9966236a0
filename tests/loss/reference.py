"""The COSMOS loss as its formulas read, in float64 with autograd, and random features to try it on."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.profiler import profile

from cosmos_scale.batch import Features, TeacherFeatures


class Counts(NamedTuple):
    """Views V, captions K, global (teacher) views and captions, width E; samples of the global batch G."""

    V: int
    K: int
    V_global: int
    K_global: int
    E: int
    G: int


def random_features(
    counts: Counts, *, seed: int = 0, scale: float = 1 / 0.07, distill_scale: float = 1 / 0.07
) -> tuple[Features, TeacherFeatures]:
    """Float32 normalised features of which the views of one sample resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(counts.G, counts.E, generator=generator)

    def views(count: int) -> Tensor:
        return F.normalize(samples + torch.randn(count, counts.G, counts.E, generator=generator), dim=-1)

    features = Features(
        image=views(counts.V),
        text=views(counts.K),
        image_crossmodal=views(counts.V),
        text_crossmodal=views(counts.K),
        logit_scale=torch.tensor([scale]).log(),
        distill_logit_scale=torch.tensor([distill_scale]).log(),
    )
    return features, TeacherFeatures(image=views(counts.V_global), text=views(counts.K_global))


def of_rank(
    features: Features, teacher: TeacherFeatures, rank: int, world_size: int
) -> tuple[Features, TeacherFeatures]:
    """A rank's contiguous share of the samples; the log-scales whole."""
    teacher_share = TeacherFeatures(*(tensor.chunk(world_size, dim=1)[rank] for tensor in teacher))
    share = Features(*(tensor.chunk(world_size, dim=1)[rank] if tensor.dim() == 3 else tensor for tensor in features))
    return share, teacher_share


def plain_loss(features: Features, teacher: TeacherFeatures) -> tuple[Tensor, Tensor]:
    """Clip and distill losses of a whole batch, pair by pair; differentiable."""
    clip = _mean_nce(features.image[: teacher.image.shape[0]], features.text, features.logit_scale)
    groups = [
        _mean_nce(student, target, features.distill_logit_scale)
        for student in (features.image_crossmodal, features.text_crossmodal)
        for target in teacher
    ]
    return clip, torch.stack(groups).mean()


def plain_loss_and_gradients(features: Features, teacher: TeacherFeatures) -> tuple[Tensor, Tensor, Features]:
    """Clip and distill losses in float64, and autograd's gradients of their sum."""
    leaves = Features(*(tensor.double().requires_grad_() for tensor in features))
    clip, distill = plain_loss(leaves, TeacherFeatures(*(tensor.double() for tensor in teacher)))
    gradients = torch.autograd.grad(clip + distill, leaves)
    return clip.detach(), distill.detach(), Features(*gradients)


def _mean_nce(a_VBE: Tensor, b_VBE: Tensor, log_scale: Tensor) -> Tensor:
    labels = torch.arange(a_VBE.shape[1])
    losses = []
    for a in a_VBE:
        for b in b_VBE:
            logits = log_scale.exp() * a @ b.T
            losses.append((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2)
    return torch.stack(losses).mean()


def relative_differences(actual: Features, expected: Features) -> dict[str, float]:
    """Norm of the difference over the norm of what is expected, per tensor."""
    return {
        name: float((a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-9))
        for name, a, e in zip(Features._fields, actual, expected, strict=True)
    }


def operations(function: Callable[[], object]) -> list[str]:
    """Names of all operations that a call runs on the CPU, collectives (c10d::...) included, in order."""
    # Not torch.profiler: entering that imports the compiler, 1.5 s a process.
    with profile() as recorded:
        function()
    assert recorded.function_events is not None
    return [event.name for event in recorded.function_events if "::" in event.name]
