"""The COSMOS loss: pairs, weights, and the gradients of all features (COSMOS, CVPR 2025, section 3).

nce(a, b) is the mean over both directions of the cross-entropy of exp(log-scale) * a @ b.T against the diagonal.

- clip: mean of nce over {global image views} x {captions}, student features.
- distill: mean over {image crossmodal, text crossmodal} x {teacher image, teacher text} of the mean of nce over the
  pairs of views.
- total: clip + distill.

Both are two-sided over the GLOBAL batch. Rows stay on the rank that made them: captions for clip, crossmodal features
for distill. Columns are gathered: the global image views for clip, teacher features (without gradient) for distill.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cosmos_scale.batch import Features, TeacherFeatures
from cosmos_scale.kernels import contrastive
from cosmos_scale.loss.gather import Ranks


class LossOutput(NamedTuple):
    """The loss of the global batch and its gradients; detached.

    total, clip, distill: [] float32, the same on all ranks. finite: [] bool, the same on all ranks: every rank's
    features, the loss and the scales' gradients are finite; a device flag, read it when the host must know.
    gradients: float32 (float64 for float64 features), shapes as the features; average them over ranks (see CosmosLoss).
    """

    total: Tensor
    clip: Tensor
    distill: Tensor
    finite: Tensor
    gradients: Features


class CosmosLoss:
    """The loss over the batches of all ranks of a group.

    gradient_scale: what averaging the gradients over the W ranks yields.
        "true": the gradient of the loss, so this rank's features' gradients are W times their derivatives.
        "published": the features' derivatives / W, as the published implementation trains (exact for powers of 2).
        Either way the log-scales' gradients are the whole derivatives, on every rank.
    group: the ranks; None is the default group, or this process alone where torch.distributed is not initialised.
    """

    def __init__(self, gradient_scale: Literal["true", "published"], group: ProcessGroup | None = None) -> None:
        self.ranks = Ranks(group)
        self.feature_factor = float(self.ranks.size) if gradient_scale == "true" else 1.0

    @torch.no_grad()
    def __call__(self, features: Features, teacher: TeacherFeatures) -> LossOutput:
        """Compute the loss and its gradients; nothing waits for the host. All ranks call together, with equal shapes.

        features, teacher: float32, bfloat16 or float16, any numbers of views and captions; the first
        teacher.image.shape[0] image views are the global ones. Raises ValueError on shapes that do not fit.
        """
        B = features.image.shape[1]
        V_global = teacher.image.shape[0]
        if features.image.shape[0] < V_global:
            raise ValueError(f"{features.image.shape[0]} image views, fewer than the teacher's {V_global}")
        first_row = self.ranks.rank * B
        gathered_TGE = self.ranks.gather_columns([*features.image[:V_global], *teacher.image, *teacher.text])

        clip_rows, clip_columns = features.text, gathered_TGE[:V_global]
        clip_scale = _scale(features.logit_scale)
        clip_weights = _clip_weights(features, teacher)
        distill_rows = torch.cat([features.image_crossmodal, features.text_crossmodal])
        distill_columns = gathered_TGE[V_global:]
        distill_scale = _scale(features.distill_logit_scale)
        distill_weights = _distill_weights(features, teacher)

        clip = contrastive.forward_partials(clip_rows, clip_columns, clip_scale, first_row=first_row)
        distill = contrastive.forward_partials(distill_rows, distill_columns, distill_scale, first_row=first_row)
        statistics = self.ranks.combine_columns(
            [clip.column_max, distill.column_max], [clip.column_sum, distill.column_sum]
        )
        clip_lse, distill_lse = (contrastive.column_lse(*pair) for pair in statistics)

        by_clip = contrastive.backward(
            clip_rows,
            clip_columns,
            clip_scale,
            clip_weights,
            clip.row_lse,
            clip_lse,
            first_row=first_row,
            column_gradients=True,
        )
        by_distill = contrastive.backward(
            distill_rows,
            distill_columns,
            distill_scale,
            distill_weights,
            distill.row_lse,
            distill_lse,
            first_row=first_row,
            column_gradients=False,
        )
        assert by_clip.columns is not None
        by_image = torch.zeros_like(features.image, dtype=by_clip.columns.dtype)
        by_image[:V_global] = self.ranks.scatter_column_gradients(by_clip.columns)
        shares = (
            contrastive.finish(clip, clip_lse, clip_weights, first_row=first_row),
            contrastive.finish(distill, distill_lse, distill_weights, first_row=first_row),
            by_clip.log_scale,
            by_distill.log_scale,
            _count_non_finite(features, teacher),
        )
        sums = self.ranks.add(torch.stack(shares))
        V = features.image_crossmodal.shape[0]
        return LossOutput(
            total=(sums[0] + sums[1]).float(),
            clip=sums[0].float(),
            distill=sums[1].float(),
            finite=sums[:4].float().isfinite().all() & (sums[4] == 0),
            gradients=Features(
                image=by_image * self.feature_factor,
                text=by_clip.rows * self.feature_factor,
                image_crossmodal=by_distill.rows[:V] * self.feature_factor,
                text_crossmodal=by_distill.rows[V:] * self.feature_factor,
                logit_scale=sums[2:3].to(by_clip.rows.dtype),
                distill_logit_scale=sums[3:4].to(by_distill.rows.dtype),
            ),
        )


def _scale(log_scale: Tensor) -> Tensor:
    """Factor [] of the logits, at least in float32, from a [1] log-scale."""
    return log_scale[0].to(torch.promote_types(log_scale.dtype, torch.float32)).exp()


def _clip_weights(features: Features, teacher: TeacherFeatures) -> Tensor:
    """Weights [K, V_global] of the pairs (caption, global image view): their mean."""
    K, V_global = features.text.shape[0], teacher.image.shape[0]
    return torch.full((K, V_global), 1 / (K * V_global), dtype=torch.float64, device=features.text.device)


def _distill_weights(features: Features, teacher: TeacherFeatures) -> Tensor:
    """Weights [V + K, V_global + K_global] of the pairs (crossmodal, teacher view): the mean of four groups' means."""
    V, K = features.image_crossmodal.shape[0], features.text_crossmodal.shape[0]
    V_global, K_global = teacher.image.shape[0], teacher.text.shape[0]
    weights = torch.empty(V + K, V_global + K_global, dtype=torch.float64, device=teacher.image.device)
    weights[:V, :V_global].fill_(1 / (4 * V * V_global))
    weights[:V, V_global:].fill_(1 / (4 * V * K_global))
    weights[V:, :V_global].fill_(1 / (4 * K * V_global))
    weights[V:, V_global:].fill_(1 / (4 * K * K_global))
    return weights


def _count_non_finite(features: Features, teacher: TeacherFeatures) -> Tensor:
    """Count the tensors [] float64 that hold a NaN or an infinity: also views that enter no pair."""
    flags = [tensor.isfinite().all().logical_not() for tensor in (*features, *teacher)]
    return torch.stack(flags).sum(dtype=torch.float64)
