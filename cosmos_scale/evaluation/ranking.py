"""Ranks of a retrieval: the place of each query's best correct candidate, block by block of the score matrix."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RECALL_AT = (1, 5, 10)
NEVER = 1 << 62  # rank of what cannot be found
# The size of each block of scores, filled up with zeros: so a score is computed in the same way wherever it stands, on
# any number of ranks. 512 x 2,048 scores of 32 bits are 4 MiB.
ROWS, COLUMNS = 512, 2048


class RankFigures(NamedTuple):
    """Figures of one direction. recalls: shares of ranks below each of RECALL_AT. mean_rank, median_rank: from 1."""

    recalls: dict[int, float]
    mean_rank: float
    median_rank: int


def best_ranks(query: Tensor, query_sample: Tensor, candidate: Tensor, candidate_sample: Tensor) -> Tensor:
    """Return how many wrong candidates come before the best correct one of each query: [Q] int64.

    query: [Q, E], candidate: [C, E]; a candidate is correct if it belongs to the query's sample. A wrong candidate that
    scores the same as the best correct one, or NaN, comes before it. The rank of a query without any correct candidate
    is NEVER. Beside its arguments and its result the function holds a few blocks of ROWS x COLUMNS.
    """
    ranks_Q = torch.empty(len(query), dtype=torch.int64, device=query.device)
    columns = _blocks(candidate_sample, COLUMNS)
    for rows in _blocks(query_sample, ROWS):
        samples_Q1 = query_sample[rows.where, None]
        shared = [rows.least <= other.most and other.least <= rows.most for other in columns]
        best_Q1 = torch.full((len(samples_Q1), 1), -torch.inf, device=query.device, dtype=query.dtype)
        found_Q = torch.zeros(len(samples_Q1), dtype=torch.bool, device=query.device)
        for block, may_be_correct in zip(columns, shared, strict=True):
            if may_be_correct:
                correct_QC = samples_Q1 == candidate_sample[block.where]
                score_QC = _scores(query[rows.where], candidate[block.where]).masked_fill(~correct_QC, -torch.inf)
                best_Q1 = torch.maximum(best_Q1, score_QC.amax(1, keepdim=True))  # NaN stays NaN
                found_Q |= correct_QC.any(1)
        before_Q = torch.zeros_like(ranks_Q[rows.where])
        for block, may_be_correct in zip(columns, shared, strict=True):
            # "not smaller" instead of "greater or equal": also true of NaN.
            before_QC = ~(_scores(query[rows.where], candidate[block.where]) < best_Q1)
            if may_be_correct:
                before_QC &= samples_Q1 != candidate_sample[block.where]
            before_Q += before_QC.sum(1)
        ranks_Q[rows.where] = before_Q.masked_fill(~found_Q, NEVER)
    return ranks_Q


def rank_figures(ranks_Q: Tensor, candidates: int) -> RankFigures:
    """Return the figures of ranks [Q] int64 that count from 0, Q at least 1; all are made of whole numbers.

    mean_rank: the mean + 1. median_rank: the median, rounded down, + 1. A rank of NEVER counts there as the last place,
    behind all candidates. Source: the published evaluation.
    """
    places_Q = ranks_Q.clamp(max=candidates).sort().values.cpu()
    count = len(places_Q)
    middle = places_Q[(count - 1) // 2 : count // 2 + 1]
    return RankFigures(
        {k: int((ranks_Q < k).sum()) / count for k in RECALL_AT},
        int(places_Q.sum()) / count + 1,
        int(middle.sum()) // len(middle) + 1,
    )


class _Block(NamedTuple):
    """Some neighbouring rows of features, and the least and the greatest sample that they belong to."""

    where: slice
    least: int
    most: int


def _blocks(samples: Tensor, size: int) -> list[_Block]:
    parts = samples.split(size) if len(samples) else ()
    bounds = torch.stack([torch.stack([part.amin(), part.amax()]) for part in parts]).tolist() if parts else []
    return [_Block(slice(place * size, (place + 1) * size), *pair) for place, pair in enumerate(bounds)]


def _scores(query_QE: Tensor, candidate_CE: Tensor) -> Tensor:
    """Return the scores [Q, C] of a block; both are filled up with rows of zeros for the product."""
    whole_query, whole_candidate = _filled(query_QE, ROWS), _filled(candidate_CE, COLUMNS)
    return (whole_query @ whole_candidate.T)[: len(query_QE), : len(candidate_CE)]


def _filled(rows: Tensor, size: int) -> Tensor:
    return rows if len(rows) == size else F.pad(rows, (0, 0, 0, size - len(rows)))
