"""The COSMOS loss: pairs, weights, and the gradients of all features (COSMOS, CVPR 2025, section 3).

nce(a, b) is the mean over both directions of the cross-entropy of exp(log-scale) * a @ b.T against the diagonal.

- clip: mean of nce over {global image views} x {captions}, student features.
- distill: mean over {image crossmodal, text crossmodal} x {teacher image, teacher text} of the mean of nce over the
  pairs of views.
- total: clip + distill.

Both losses are two-sided over the GLOBAL batch. Rows stay on the rank that made them: captions for clip, crossmodal
features for distill. Columns are gathered: the global image views for clip, teacher features (without gradient) for
distill. Very many columns are taken a part at a time: memory beside the gathered features does not grow with them, but
for one number a column and pair of views.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cosmos_scale.batch import Features, TeacherFeatures
from cosmos_scale.kernels import contrastive, contrastive_whole
from cosmos_scale.loss.gather import BatchRanks

# Columns taken at a time. A column's copies in float32 and its gradients, of six views of width 512, take 20 kB.
COLUMNS_AT_ONCE = 2**15


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
    """One of the two losses as the kernel sees it: rows [V, B, E] of this rank, columns [W, T, B, E] of all ranks,
    weighted pairs.
    """

    rows: Tensor
    columns: Tensor
    scale: Tensor
    weights: Tensor
    column_gradients: bool

    def part(self, samples: slice) -> Tensor:
        """Return the columns of these samples of every rank, in rank order: [T, W * b, E]."""
        return self.columns[:, :, samples].transpose(0, 1).flatten(1, 2)


class _Rows(NamedTuple):
    """What is known of a problem's rows and of this rank's own columns: each [V, T, B], the last over all rows."""

    lse: Tensor
    positive: Tensor
    column_lse: Tensor


class _Part(NamedTuple):
    """Some samples of each rank as columns: the columns of each problem, and their logsumexps [V, T, W * b]."""

    samples: slice
    columns: list[Tensor] | None
    column_lse: list[Tensor]


class CosmosLoss:
    """The loss over the batches of all ranks of a group.

    gradient_scale: what the average of the gradients over the W ranks is.
        "true": the gradient of the loss. So the features' gradients are W times the loss's derivatives.
        "published": 1 / W of it, as the published implementation trains. So the features' gradients are the loss's
        derivatives (for W a power of 2 the factor is exact).
        Either way the log-scales' gradients are the loss's whole derivatives on every rank.
    group: the ranks; None is the default group, or this process alone where torch.distributed is not initialised.
    kernels: as in the config. columns_at_once: how many columns are taken at a time, at least one of each rank.
    """

    def __init__(
        self,
        gradient_scale: Literal["true", "published"],
        group: ProcessGroup | None = None,
        *,
        kernels: Literal["auto", "torch"] = "auto",
        columns_at_once: int = COLUMNS_AT_ONCE,
    ) -> None:
        self.ranks = BatchRanks(group)
        self._part_samples = max(1, columns_at_once // self.ranks.size)
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
        gathered_WTBE = self.ranks.gather_columns([*features.image[:V_global], *teacher.image, *teacher.text])

        clip = _Problem(
            rows=features.text,
            columns=gathered_WTBE[:, :V_global],
            scale=_scale(features.logit_scale),
            weights=_clip_weights(K, V_global, features.text.device),
            column_gradients=True,
        )
        distill = _Problem(
            rows=torch.cat([features.image_crossmodal, features.text_crossmodal]),
            columns=gathered_WTBE[:, V_global:],
            scale=_scale(features.distill_logit_scale),
            weights=_distill_weights(V, K, V_global, teacher.text.shape[0], features.text.device),
            column_gradients=False,
        )
        problems = (clip, distill)
        (clip_share, by_clip), (distill_share, by_distill) = (
            [self._alone(problem) for problem in problems]
            if self.ranks.size == 1 and self._part_samples >= B
            else self._by_parts(problems)
        )
        zero_here = _zero_if_finite(features, teacher)
        shares = [clip_share, distill_share, by_clip.log_scale, by_distill.log_scale, zero_here]
        dtype = by_clip.rows.dtype
        scalars = self.ranks.add(torch.stack(shares)).to(dtype)
        clip_loss, distill_loss, by_logit_scale, by_distill_scale, _ = scalars.split(1)

        assert by_clip.columns is not None
        by_image = torch.zeros_like(features.image, dtype=dtype)  # local crops enter no pair of clip
        by_image[:V_global] = by_clip.columns
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

    def _by_parts(self, problems: Sequence[_Problem]) -> list[tuple[Tensor, contrastive.Gradients]]:
        """Return this rank's share of each loss and its gradients; columns': of this rank's own [T, B, E]."""
        of_rows, parts = self._statistics(problems)
        W, B = self.ranks.size, problems[0].rows.shape[1]
        found: list[contrastive.Gradients | None] = [None for _ in problems]
        for part in parts:
            for number, problem in enumerate(problems):
                gradients = contrastive.backward(
                    problem.rows,
                    problem.part(part.samples) if part.columns is None else part.columns[number],
                    problem.scale,
                    problem.weights,
                    of_rows[number].lse,
                    part.column_lse[number],
                    first_row=self._first_row(part.samples),
                    positive_rows=part.samples,
                    samples=W * B,
                    column_gradients=problem.column_gradients,
                    triton=self._triton,
                )
                if gradients.columns is not None:
                    own_columns = self.ranks.scatter_column_gradients(gradients.columns)
                    gradients = gradients._replace(columns=own_columns)
                found[number] = _added(found[number], gradients, problem.rows)
        return [
            (contrastive.share_of_loss(*rows, problem.weights, W * B), gradients)
            for rows, problem, gradients in zip(of_rows, problems, found, strict=True)
            if gradients is not None
        ]

    def _statistics(self, problems: Sequence[_Problem]) -> tuple[list[_Rows], list[_Part]]:
        """Return the logsumexps and positives of the problems' rows, and the parts of their columns."""
        B = problems[0].rows.shape[1]
        of_rows: list[_Rows] = []
        parts: list[_Part] = []
        for start in range(0, B, self._part_samples):
            samples = slice(start, min(start + self._part_samples, B))
            columns = [problem.part(samples) for problem in problems]
            partials = [
                contrastive.forward_partials(
                    problem.rows,
                    of_problem,
                    problem.scale,
                    first_row=self._first_row(samples),
                    positive_rows=samples,
                    triton=self._triton,
                )
                for problem, of_problem in zip(problems, columns, strict=True)
            ]
            column_lse = self.ranks.combine_columns([partial.column_lse for partial in partials])
            own = [lse.unflatten(2, (self.ranks.size, -1))[:, :, self.ranks.rank] for lse in column_lse]
            found = [_Rows(p.row_lse, p.positive, lse) for p, lse in zip(partials, own, strict=True)]
            of_rows = [_joined(*both) for both in zip(of_rows, found, strict=True)] if of_rows else found
            parts.append(_Part(samples, columns if samples == slice(0, B) else None, column_lse))
        return of_rows, parts

    def _first_row(self, samples: slice) -> int:
        """Return where row 0's own column would lie among the columns of some samples of every rank."""
        return self.ranks.rank * int(samples.stop - samples.start) - int(samples.start)

    def _alone(self, problem: _Problem) -> tuple[Tensor, contrastive.Gradients]:
        """Return a loss and its gradients where there are no other ranks, and few columns."""
        return contrastive_whole.whole_batch(
            problem.rows,
            problem.columns[0],
            problem.scale,
            problem.weights,
            column_gradients=problem.column_gradients,
            triton=self._triton,
        )


def _joined(before: _Rows, found: _Rows) -> _Rows:
    """Join what earlier columns and further columns say of the rows."""
    return _Rows(
        torch.logaddexp(before.lse, found.lse),
        torch.cat([before.positive, found.positive], dim=2),
        torch.cat([before.column_lse, found.column_lse], dim=2),
    )


def _added(before: contrastive.Gradients | None, further: contrastive.Gradients, rows: Tensor) -> contrastive.Gradients:
    """Add the rows' gradients from further columns, and join the gradients of this rank's own columns."""
    if before is None:
        return further
    by_rows = before.rows.add_(further.rows)
    # The parts' derivatives by the scale may cancel one another, so that of the sum is computed, not their sum.
    log_scale = contrastive.by_log_scale(rows, by_rows)
    if before.columns is None or further.columns is None:
        return contrastive.Gradients(by_rows, None, log_scale)
    return contrastive.Gradients(by_rows, torch.cat([before.columns, further.columns], dim=1), log_scale)


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
