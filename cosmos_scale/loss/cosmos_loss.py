"""The COSMOS loss: pairs, weights, and the gradients of all features (COSMOS, CVPR 2025, section 3).

nce(a, b) is the mean over both directions of the cross-entropy of exp(log-scale) * a @ b.T against the diagonal.

- clip: mean of nce over {global image views} x {captions}, student features.
- distill: mean over {image crossmodal, text crossmodal} x {teacher image, teacher text} of the mean of nce over the
  pairs of views.
- total: clip + distill.

Both losses are two-sided over the GLOBAL batch. Rows stay on the rank that made them: captions for clip, crossmodal
features for distill. Columns are gathered: the global image views for clip, teacher features (without gradient) for
distill.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cosmos_scale.batch import Features, TeacherFeatures
from cosmos_scale.kernels import contrastive
from cosmos_scale.loss.gather import BatchRanks


class LossOutput(NamedTuple):
    """The loss of the global batch and its gradients; detached.

    total, clip, distill: [] float32, the same on all ranks. finite: [] bool on the device, the same on all ranks:
    whether every rank's features, the loss and the scales' gradients are finite. features_finite: [] bool on the
    device: whether this rank's features, the teacher's too, are finite.
    gradients: float32 (float64 for float64 features), in the features' shapes; to be averaged over ranks (see
    CosmosLoss).
    """

    total: Tensor
    clip: Tensor
    distill: Tensor
    finite: Tensor
    features_finite: Tensor
    gradients: Features


class _Problem(NamedTuple):
    """One of the two losses as the kernel sees it: rows of this rank, gathered columns, weighted pairs."""

    rows: Tensor
    columns: Tensor
    scale: Tensor
    weights: Tensor
    column_gradients: bool


class CosmosLoss:
    """The loss over the batches of all ranks of a group.

    gradient_scale: what the average of the gradients over the W ranks is.
        "true": the gradient of the loss. So the features' gradients are W times the loss's derivatives.
        "published": 1 / W of it, as the published implementation trains. So the features' gradients are the loss's
        derivatives (for W a power of 2 the factor is exact).
        Either way the log-scales' gradients are the loss's whole derivatives on every rank.
    group: the ranks; None is the default group, or this process alone where torch.distributed is not initialised.
    kernels: as in the config.
    """

    def __init__(
        self,
        gradient_scale: Literal["true", "published"],
        group: ProcessGroup | None = None,
        *,
        kernels: Literal["auto", "torch"] = "auto",
    ) -> None:
        self.ranks = BatchRanks(group)
        self._triton = kernels == "auto"
        self.feature_factor = float(self.ranks.size) if gradient_scale == "true" else 1.0

    @torch.no_grad()
    def __call__(self, features: Features, teacher: TeacherFeatures) -> LossOutput:
        """Compute the loss and its gradients; the host never waits. All ranks call together, with equal shapes.

        features, teacher: float32, bfloat16 or float16, any numbers of views and captions; the first
        teacher.image.shape[0] image views are the global ones. Raises ValueError on shapes that do not fit.
        """
        _check(features, teacher)
        (V, B, _), K, V_global = features.image_crossmodal.shape, features.text.shape[0], teacher.image.shape[0]
        first_row = self.ranks.rank * B
        gathered_TGE = self.ranks.gather_columns([*features.image[:V_global], *teacher.image, *teacher.text])

        clip = _Problem(
            rows=features.text,
            columns=gathered_TGE[:V_global],
            scale=_scale(features.logit_scale),
            weights=_clip_weights(K, V_global, features.text.device),
            column_gradients=True,
        )
        distill = _Problem(
            rows=torch.cat([features.image_crossmodal, features.text_crossmodal]),
            columns=gathered_TGE[V_global:],
            scale=_scale(features.distill_logit_scale),
            weights=_distill_weights(V, K, V_global, teacher.text.shape[0], features.text.device),
            column_gradients=False,
        )
        problems = (clip, distill)
        (clip_share, by_clip), (distill_share, by_distill) = (
            self._across_ranks(problems, first_row) if self.ranks.size > 1 else [self._alone(p) for p in problems]
        )
        zero_here = _zero_if_finite(features, teacher)
        shares = [clip_share, distill_share, by_clip.log_scale, by_distill.log_scale, zero_here]
        dtype = by_clip.rows.dtype
        scalars = self.ranks.add(torch.stack(shares)).to(dtype)
        clip_loss, distill_loss, by_logit_scale, by_distill_scale, _ = scalars.split(1)

        assert by_clip.columns is not None
        by_image = torch.zeros_like(features.image, dtype=dtype)  # local crops enter no pair of clip
        by_image[:V_global] = self.ranks.scatter_column_gradients(by_clip.columns)
        if self.feature_factor != 1.0:
            torch._foreach_mul_([by_image, by_clip.rows, by_distill.rows], self.feature_factor)
        return LossOutput(
            total=(clip_loss + distill_loss).float()[0],
            clip=clip_loss.float()[0],
            distill=distill_loss.float()[0],
            finite=(scalars.float() * 0.0).sum() == 0.0,
            features_finite=zero_here == 0.0,
            gradients=Features(
                image=by_image,
                text=by_clip.rows,
                image_crossmodal=by_distill.rows[:V],
                text_crossmodal=by_distill.rows[V:],
                logit_scale=by_logit_scale,
                distill_logit_scale=by_distill_scale,
            ),
        )

    def _across_ranks(self, problems: Sequence[_Problem], first_row: int) -> list[tuple[Tensor, contrastive.Gradients]]:
        """Return this rank's share of each loss and its gradients, from the columns' statistics of all ranks."""
        partials = [
            contrastive.forward_partials(p.rows, p.columns, p.scale, first_row=first_row, triton=self._triton)
            for p in problems
        ]
        of_all_ranks = self.ranks.combine_columns([partial.column_lse for partial in partials])
        results = []
        for problem, partial, column_lse in zip(problems, partials, of_all_ranks, strict=True):
            gradients = contrastive.backward(
                problem.rows,
                problem.columns,
                problem.scale,
                problem.weights,
                partial.row_lse,
                column_lse,
                first_row=first_row,
                column_gradients=problem.column_gradients,
                triton=self._triton,
            )
            results.append((contrastive.finish(partial, column_lse, problem.weights, first_row=first_row), gradients))
        return results

    def _alone(self, problem: _Problem) -> tuple[Tensor, contrastive.Gradients]:
        """Return a loss and its gradients where there are no other ranks."""
        return contrastive.whole_batch(
            problem.rows,
            problem.columns,
            problem.scale,
            problem.weights,
            column_gradients=problem.column_gradients,
            triton=self._triton,
        )


def _check(features: Features, teacher: TeacherFeatures) -> None:
    """Refuse shapes that do not fit one another."""
    shape = features.image.shape
    for tensor in (*features[:4], *teacher):
        if tensor.dim() != 3 or tensor.shape[1:] != shape[1:]:
            raise ValueError(f"features {list(tensor.shape)} and {list(shape)} differ in samples or width")
    if shape[0] < teacher.image.shape[0]:
        raise ValueError(f"{shape[0]} image views, fewer than the teacher's {teacher.image.shape[0]}")


def _scale(log_scale: Tensor) -> Tensor:
    """Factor [] of the logits, at least in float32, from a [1] log-scale."""
    return log_scale[0].to(torch.promote_types(log_scale.dtype, torch.float32)).exp()


@lru_cache(maxsize=16)
def _clip_weights(K: int, V_global: int, device: torch.device) -> Tensor:
    """Weights [K, V_global] of the pairs (caption, global image view): their mean."""
    return torch.full((K, V_global), 1 / (K * V_global), dtype=torch.float64, device=device)


@lru_cache(maxsize=16)
def _distill_weights(V: int, K: int, V_global: int, K_global: int, device: torch.device) -> Tensor:
    """Weights [V + K, V_global + K_global] of the pairs (crossmodal, teacher view): the mean of four groups' means."""
    weights = torch.empty(V + K, V_global + K_global, dtype=torch.float64, device=device)
    weights[:V, :V_global].fill_(1 / (4 * V * V_global))
    weights[:V, V_global:].fill_(1 / (4 * V * K_global))
    weights[V:, :V_global].fill_(1 / (4 * K * V_global))
    weights[V:, V_global:].fill_(1 / (4 * K * K_global))
    return weights


def _zero_if_finite(features: Features, teacher: TeacherFeatures) -> Tensor:
    """Return 0 if all features and scales are finite, else NaN: [] float64; views that enter no pair count too."""
    # The largest element says it for all: NaN and infinity pass through the maximum.
    largest = torch._foreach_norm([*features[:4], *teacher], torch.inf)
    numbers = torch.stack([*largest, features.logit_scale[0], features.distill_logit_scale[0]])
    return (numbers * 0.0).sum(dtype=torch.float64)
