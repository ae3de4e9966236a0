"""One training step of COSMOS: student, teacher, loss, backward, update."""

from typing import NamedTuple

from torch import Tensor

from cosmos_scale.batch import Batch
from cosmos_scale.engine.span import Span
from cosmos_scale.engine.student import Student
from cosmos_scale.engine.teacher import Teacher
from cosmos_scale.loss.cosmos_loss import CosmosLoss
from cosmos_scale.phases import phase


class StepOutput(NamedTuple):
    """What a step leaves behind, on the device; reading it on the host waits for the step.

    total, clip, distill: [] float32, over the global batch. finite: [] bool, equal on all ranks: whether loss and
    gradient are finite (in fp16 the loss alone); where they are not, the step changed nothing. features_finite: []
    bool: whether the features of student and teacher are finite on this rank. logit_scale, distill_logit_scale: [1],
    before the update. gradient_norm: [] float32, over all parameters, before clipping.
    substituted: [] int64 on the CPU, how many samples of this rank's batch replace a damaged one.
    forward: the time of the student's forward, in which this rank waits for no other at ZeRO stages 0 to 2.
    """

    total: Tensor
    clip: Tensor
    distill: Tensor
    finite: Tensor
    features_finite: Tensor
    logit_scale: Tensor
    distill_logit_scale: Tensor
    gradient_norm: Tensor
    substituted: Tensor
    forward: Span


def train_step(
    student: Student, teacher: Teacher, cosmos_loss: CosmosLoss, batch: Batch, *, lr: float, momentum: float
) -> StepOutput:
    """Train on one batch. Collective.

    batch: this rank's share, on the device. lr: learning rate. momentum: the share of itself that the teacher keeps.
    Nothing here makes the host wait for the device. DeepSpeed (0.19) makes it wait around the update with offloading
    and in fp16, and at stage 3 on a GPU at the backward's end.
    """
    forward = Span(on_gpu=batch.global_crops.is_cuda)
    with phase("student"):
        features = student(batch)
    forward.end()
    with phase("teacher"):
        teacher_features = teacher(batch)
    with phase("loss"):
        exact = student.with_full_scales(features)
        loss = cosmos_loss(exact, teacher_features)
        # Copies, since at stage 0 these scales are the masters themselves, which the update changes in place.
        scales = [scale.clone() for scale in (exact.logit_scale, exact.distill_logit_scale)]
    with phase("backward"):
        student.backward(batch, features, loss.gradients)
    with phase("update"):
        update = student.update(lr=lr, momentum=momentum, finite=loss.finite)
    with phase("refresh"):
        teacher.refresh()
    return StepOutput(
        total=loss.total,
        clip=loss.clip,
        distill=loss.distill,
        finite=update.finite,
        features_finite=loss.features_finite,
        logit_scale=scales[0],
        distill_logit_scale=scales[1],
        gradient_norm=update.gradient_norm,
        substituted=batch.substituted,
        forward=forward,
    )
