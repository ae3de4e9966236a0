"""The multi-pair InfoNCE kernel against autograd of the plain formula in float64.

Three ways lead to every answer: statistics, then gradients, as several ranks need; the same with a part of the columns
at a time; and all at once, as one rank can.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_scale.kernels import contrastive, contrastive_whole
from cosmos_scale.testing.allocation import peak_bytes
from cosmos_scale.testing.tolerances import tolerance

FLOAT64_TOLERANCE, FLOAT32_TOLERANCE = (
    tolerance("contrastive, widened, relative", dtype) for dtype in (torch.float64, torch.float32)
)
AT_SCALE_100, DISTANT, NEAR, NEAR_BY_SCALE = (
    tolerance(f"contrastive at scale 100, {case}relative", torch.float32)
    for case in ("", "distant samples, ", "near samples, ", "near samples, by the scale, ")
)


class Problem(NamedTuple):
    rows: Tensor
    columns: Tensor
    log_scale: Tensor
    weights: Tensor


class Answer(NamedTuple):
    loss: Tensor
    rows: Tensor
    columns: Tensor
    log_scale: Tensor


def _problem(V: int, T: int, G: int, E: int, *, scale: float = 1 / 0.07, seed: int = 0) -> Problem:
    """Random features of which the views of one sample resemble each other, and unequal weights."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(G, E, generator=generator, dtype=torch.float64)
    rows = F.normalize(samples + torch.randn(V, G, E, generator=generator, dtype=torch.float64), dim=-1)
    columns = F.normalize(samples + torch.randn(T, G, E, generator=generator, dtype=torch.float64), dim=-1)
    weights = torch.rand(V, T, generator=generator, dtype=torch.float64) + 0.1
    return Problem(rows, columns, torch.tensor(scale, dtype=torch.float64).log(), weights)


def _oracle(problem: Problem) -> Answer:
    """The definition, pair by pair, differentiated by autograd in float64."""
    rows, columns, log_scale = (
        tensor.detach().double().requires_grad_() for tensor in (problem.rows, problem.columns, problem.log_scale)
    )
    labels = torch.arange(rows.shape[1])
    loss = torch.zeros((), dtype=torch.float64)
    for v in range(rows.shape[0]):
        for t in range(columns.shape[0]):
            logits = log_scale.exp() * rows[v] @ columns[t].T
            both = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
            loss = loss + problem.weights[v, t].double() * both / 2
    return Answer(loss.detach(), *torch.autograd.grad(loss, (rows, columns, log_scale)))


def _by_kernel(problem: Problem, *, ranks: int = 1, block_elements: int = contrastive.BLOCK_ELEMENTS) -> Answer:
    """The kernel's answer, with the rows split over ranks and their statistics combined here."""
    G = problem.columns.shape[1]
    scale = problem.log_scale.exp()
    B = problem.rows.shape[1] // ranks
    shares = [(problem.rows[:, first : first + B], first) for first in range(0, ranks * B, B)]
    partials = [
        contrastive.forward_partials(rows, problem.columns, scale, first_row=first, block_elements=block_elements)
        for rows, first in shares
    ]
    lse = torch.stack([part.column_lse for part in partials]).logsumexp(0)
    losses = [
        contrastive.share_of_loss(part.row_lse, part.positive, lse[:, :, first : first + B], problem.weights, G)
        for part, (_, first) in zip(partials, shares, strict=True)
    ]
    gradients = [
        contrastive.backward(
            rows,
            problem.columns,
            scale,
            problem.weights,
            part.row_lse,
            lse,
            first_row=first,
            column_gradients=True,
            block_elements=block_elements,
        )
        for part, (rows, first) in zip(partials, shares, strict=True)
    ]
    return Answer(
        torch.stack(losses).sum(),
        torch.cat([gradient.rows for gradient in gradients], dim=1),
        torch.stack([gradient.columns for gradient in gradients if gradient.columns is not None]).sum(0),
        torch.stack([gradient.log_scale for gradient in gradients]).sum(),
    )


def _by_parts(problem: Problem, *, parts: int = 3) -> Answer:
    """The kernel's answer, with the columns taken in unequal parts: some rows have their positives in each."""
    rows, columns, log_scale, weights = problem
    scale, B = log_scale.exp(), rows.shape[1]
    borders = [0, *(B * (number + 1) // parts - number for number in range(parts - 1)), B]
    places = [slice(*border) for border in itertools.pairwise(borders)]
    found = [
        contrastive.forward_partials(rows, columns[:, place], scale, first_row=-place.start, positive_rows=place)
        for place in places
    ]
    row_lse = torch.stack([part.row_lse for part in found]).logsumexp(0)
    positive, column_lse = (torch.cat([part[field] for part in found], dim=2) for field in (1, 2))
    gradients = [
        contrastive.backward(
            *(rows, columns[:, place], scale, weights, row_lse, column_lse[:, :, place]),
            first_row=-place.start,
            positive_rows=place,
            samples=B,
            column_gradients=True,
        )
        for place in places
    ]
    by_rows = torch.stack([gradient.rows for gradient in gradients]).sum(0)
    return Answer(
        contrastive.share_of_loss(row_lse, positive, column_lse, weights, B),
        by_rows,
        torch.cat([gradient.columns for gradient in gradients if gradient.columns is not None], dim=1),
        contrastive.by_log_scale(rows, by_rows),
    )


def _at_once(problem: Problem, *, block_elements: int = contrastive.BLOCK_ELEMENTS, pair_elements: int = 1) -> Answer:
    """The kernel's answer where one rank holds all rows; pair by pair, however small a pair is."""
    loss, gradients = contrastive_whole.whole_batch(
        problem.rows,
        problem.columns,
        problem.log_scale.exp(),
        problem.weights,
        column_gradients=True,
        block_elements=block_elements,
        pair_elements=pair_elements,
    )
    assert gradients.columns is not None
    return Answer(loss, gradients.rows, gradients.columns, gradients.log_scale)


WAYS: dict[str, Callable[[Problem], Answer]] = {
    "statistics first": _by_kernel,
    "columns by parts": _by_parts,
    "at once": _at_once,
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def _float32(problem: Problem) -> Problem:
    return Problem(*(tensor.float() for tensor in problem))


def _assert_close(answer: Answer, expected: Answer, limit: float, by_scale: float | None = None) -> None:
    """limit: of differences, relative by norm; by_scale: of the derivative by the scale, where it is another one."""
    for name, actual, wanted in zip(Answer._fields, answer, expected, strict=True):
        assert actual.shape == wanted.shape, name
        difference = (actual.double() - wanted).norm() / wanted.norm().clamp_min(1e-9)
        most = by_scale if by_scale is not None and name == "log_scale" else limit
        assert difference <= most, f"{name}: {difference:.2e}"


# Several whole views a block; a block that does not divide the batch; one row a block.
@pytest.mark.parametrize("block_elements", [contrastive.BLOCK_ELEMENTS, 3 * 3 * 10, 1])
@pytest.mark.parametrize(
    ("V", "T", "G", "ranks"), [(5, 3, 10, 1), (5, 3, 10, 2), (1, 1, 7, 1), (2, 4, 1, 1), (3, 2, 4, 4)]
)
def test_matches_autograd_in_float64(V: int, T: int, G: int, ranks: int, block_elements: int) -> None:
    problem = _problem(V, T, G, 16)
    _assert_close(_by_kernel(problem, ranks=ranks, block_elements=block_elements), _oracle(problem), FLOAT64_TOLERANCE)


# One pair at a time; factors that do not divide the batch; pairs too small or too large to be taken one by one.
@pytest.mark.parametrize("factor_elements", [contrastive_whole.FACTOR_ELEMENTS, 3 * 10, 1])
@pytest.mark.parametrize(("block_elements", "pair_elements"), [(10**6, 1), (10**6, 10**6), (30, 1)])
@pytest.mark.parametrize(("V", "T", "G"), [(5, 3, 10), (1, 1, 7), (3, 2, 4)])
def test_all_at_once_matches_autograd_in_float64(
    V: int,
    T: int,
    G: int,
    block_elements: int,
    pair_elements: int,
    factor_elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(contrastive_whole, "FACTOR_ELEMENTS", factor_elements)
    problem = _problem(V, T, G, 16)
    answer = _at_once(problem, block_elements=block_elements, pair_elements=pair_elements)
    _assert_close(answer, _oracle(problem), FLOAT64_TOLERANCE)


def test_a_single_sample_has_neither_loss_nor_gradient() -> None:
    limit = tolerance("contrastive of one sample", torch.float64)
    assert all(part.abs().max() <= limit for part in _at_once(_problem(2, 4, 1, 16)))


def test_float32_all_at_once_stays_close_to_float64() -> None:
    problem = _problem(8, 4, 33, 64)
    _assert_close(_at_once(_float32(problem)), _oracle(problem), FLOAT32_TOLERANCE)


@pytest.mark.parametrize("ranks", [1, 3])
def test_float32_stays_close_to_float64(ranks: int) -> None:
    problem = _problem(8, 4, 33, 64)
    _assert_close(
        _by_kernel(Problem(*(tensor.float() for tensor in problem)), ranks=ranks, block_elements=1000),
        _oracle(problem),
        FLOAT32_TOLERANCE,
    )


@each_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_features_keep_float32_logits(dtype: torch.dtype, way: Callable[[Problem], Answer]) -> None:
    problem = _problem(3, 2, 12, 64)
    rounded = problem._replace(rows=problem.rows.to(dtype), columns=problem.columns.to(dtype))
    answer = way(rounded._replace(log_scale=problem.log_scale.float()))
    assert answer.rows.dtype == answer.columns.dtype == torch.float32
    # The oracle sees the rounded features, so bfloat16 logits (rounding 4e-3) would be far outside.
    _assert_close(answer, _oracle(rounded), tolerance("contrastive, widened, relative", dtype))


@each_way
def test_small_loss_at_the_largest_scale_keeps_its_digits(way: Callable[[Problem], Answer]) -> None:
    # Features that share most of their direction: every logit is near 90, and the loss is their small differences.
    problem = _problem(8, 4, 64, 64, scale=100.0)
    common = 3 * F.normalize(torch.ones(64, dtype=torch.float64), dim=0)
    samples = F.normalize(problem.columns[:1], dim=-1) + common
    rows, columns = (F.normalize(samples + 0.2 * noise, dim=-1) for noise in (problem.rows, problem.columns))
    problem = problem._replace(rows=rows, columns=columns)
    expected = _oracle(problem)
    assert 0.01 < expected.loss < 1.0
    answer = way(_float32(problem))
    limit = tolerance("contrastive loss of near samples, of the weights", torch.float32) * problem.weights.sum()
    assert (answer.loss - expected.loss).abs() <= limit, (answer.loss, expected.loss)


# With three and three, near samples alone decide: features that differ by a tenth.
@each_way
@pytest.mark.parametrize(("distant_rows", "distant_columns", "limit"), [(0, 1, DISTANT), (1, 0, DISTANT), (3, 3, NEAR)])
def test_distant_samples_neither_overflow_nor_vanish(
    distant_rows: int, distant_columns: int, limit: float, way: Callable[[Problem], Answer]
) -> None:
    # All point one way but the distant ones, which point the opposite way: all of their logits, or all with the others,
    # are near -100, so that their exponentials are 0 in float32 less the others' maximum.
    noise = _problem(1, 1, 6, 8)
    rows, columns = (
        F.normalize(torch.ones(1, 6, 8, dtype=torch.float64) + 0.1 * part, dim=-1)
        for part in (noise.rows, noise.columns)
    )
    rows[:, :distant_rows] *= -1
    columns[:, :distant_columns] *= -1
    problem = Problem(rows, columns, torch.tensor(100.0, dtype=torch.float64).log(), torch.ones(1, 1))
    by_scale = NEAR_BY_SCALE if limit == NEAR else limit
    _assert_close(way(_float32(problem)), _oracle(problem), limit, by_scale)


def test_distant_columns_survive_the_exchange_between_ranks() -> None:
    rows = F.normalize(torch.ones(1, 4, 8, dtype=torch.float64) + 0.01 * _problem(1, 1, 4, 8).rows, dim=-1)
    columns = rows.clone()
    columns[:, 0] *= -1
    problem = Problem(rows, columns, torch.tensor(100.0, dtype=torch.float64).log(), torch.ones(1, 1))
    _assert_close(_by_kernel(_float32(problem), ranks=2), _oracle(problem), DISTANT)


def test_random_features_at_the_largest_scale_match_float64_both_ways() -> None:
    # In 8 dimensions 64 random directions lie from nearly equal to nearly opposite: logits from -100 to 100.
    generator = torch.Generator().manual_seed(1)
    rows, columns = (
        F.normalize(torch.randn(n, 64, 8, generator=generator, dtype=torch.float64), dim=-1) for n in (3, 2)
    )
    problem = Problem(rows, columns, torch.tensor(100.0, dtype=torch.float64).log(), torch.ones(3, 2))
    expected = _oracle(problem)
    for name, way in WAYS.items():
        answer = way(_float32(problem))
        assert answer.rows.isfinite().all(), name
        _assert_close(answer, expected, AT_SCALE_100)


class _LargestTensor(TorchDispatchMode):
    """Record the most elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_tensor_outgrows_a_block() -> None:
    problem = _problem(2, 3, 64, 4)
    logits_of_a_pair, block = 64 * 64, 512
    with _LargestTensor() as largest:
        _by_kernel(problem, block_elements=block)
    assert block / 2 < largest.elements <= max(block, problem.columns.numel())
    assert max(block, problem.columns.numel()) < logits_of_a_pair


# Pair by pair (two buffers); in blocks. A whole pair of the largest would be 1 GiB.
@pytest.mark.parametrize("samples", [512, 2048, 4096, pytest.param(16_384, marks=pytest.mark.slow)])
def test_memory_is_linear_in_the_batch(samples: int) -> None:
    V, T, E = 2, 1, 8
    generator = torch.Generator().manual_seed(0)
    rows, columns = (F.normalize(torch.randn(n, samples, E, generator=generator), dim=-1) for n in (V, T))
    peak = peak_bytes(
        lambda: contrastive_whole.whole_batch(
            rows, columns, torch.tensor(14.0), torch.ones(V, T), column_gradients=True
        )
    )
    scratch = contrastive.SCRATCH_BLOCKS * min(contrastive.BLOCK_ELEMENTS, samples**2)
    # Results are as large as the features, a block's scaled rows and their slopes at most; statistics are 8 numbers at
    # most a sample and pair, in float32 or half as many in float64.
    linear = samples * (2 * (V + T) * E + 8 * V * T)
    assert samples**2 * 4 < peak or samples > 2048, "the peak has missed the logits"
    assert peak <= (scratch + linear) * 4


def test_columns_without_gradient_cost_none() -> None:
    problem = _problem(2, 3, 5, 8)
    scale = problem.log_scale.exp()
    _, at_once = contrastive_whole.whole_batch(
        problem.rows, problem.columns, scale, problem.weights, column_gradients=False, pair_elements=1
    )
    assert at_once.columns is None
    torch.testing.assert_close(at_once.rows, _oracle(problem).rows, rtol=0, atol=FLOAT64_TOLERANCE)
    part = contrastive.forward_partials(problem.rows, problem.columns, scale, first_row=0)
    gradients = contrastive.backward(
        problem.rows,
        problem.columns,
        scale,
        problem.weights,
        part.row_lse,
        part.column_lse,
        first_row=0,
        column_gradients=False,
    )
    assert gradients.columns is None
    torch.testing.assert_close(gradients.rows, _oracle(problem).rows, rtol=0, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize(
    ("rows", "columns", "scale", "first_row", "message"),
    [
        ([2, 4, 8], [3, 4, 9], [], 0, r"rows \[2, 4, 8\] and columns \[3, 4, 9\]"),
        ([4, 8], [3, 4, 8], [], 0, r"rows \[4, 8\] and columns"),
        ([2, 4, 8], [3, 4, 8], [1], 0, r"scale \[1\] must be \[\]"),
        ([2, 4, 8], [3, 6, 8], [], 3, "rows 3 to 7 must lie within the 6 columns"),
        ([2, 4, 8], [3, 6, 8], [], -1, "rows -1 to 3"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    rows: list[int], columns: list[int], scale: list[int], first_row: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        contrastive.forward_partials(torch.ones(rows), torch.ones(columns), torch.ones(scale), first_row=first_row)


def test_a_share_of_the_rows_is_no_whole_batch() -> None:
    with pytest.raises(ValueError, match=r"rows \[2, 4, 8\] must be all rows: as many as columns \[3, 6, 8\]"):
        contrastive_whole.whole_batch(
            torch.ones(2, 4, 8), torch.ones(3, 6, 8), torch.tensor(1.0), torch.ones(2, 3), column_gradients=False
        )
