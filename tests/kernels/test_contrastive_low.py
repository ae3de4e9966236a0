"""The contrastive loss by torch's operators on a GPU: features of low precision are multiplied as they are.

A CPU cannot multiply them so. Here torch's product gets the CPU form that its definition says: factors of low
precision, whose products are exact in float32, added up in float32.
"""

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cosmos_scale.kernels import contrastive, contrastive_whole
from cosmos_scale.profiling.operators import DeviceCounter
from cosmos_scale.testing.tolerances import tolerance
from tests.kernels.test_contrastive import Answer, Problem, _by_kernel, _oracle, _problem

needs_product = pytest.mark.skipif(not contrastive.SUMS_IN_FLOAT32, reason="this torch has no such product")
LOW = (torch.bfloat16, torch.float16)
both = pytest.mark.parametrize("dtype", LOW)
# Views, other views, samples, width. With 3,000 samples float16 holds no slope of equal logits as it is, 4e-8.
SIZES = [(8, 4, 33, 64, 1 / 0.07), (2, 3, 40, 24, 100.0), (1, 1, 3000, 16, 1.0)]
each_size = pytest.mark.parametrize(("V", "T", "G", "E", "scale"), SIZES)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let CPU tensors go the way of a GPU's."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")
    monkeypatch.setattr(contrastive, "_factors_dtype", lambda rows, columns: rows.dtype)
    yield
    library._destroy()


def low(problem: Problem, dtype: torch.dtype, device: str = "cpu") -> Problem:
    """The problem with rounded features."""
    rows, columns = (tensor.to(device, dtype) for tensor in (problem.rows, problem.columns))
    return Problem(rows, columns, problem.log_scale.float().to(device), problem.weights.to(device))


def check(answer: Answer, expected: Answer, dtype: torch.dtype) -> None:
    """The loss has float32's rounding of the logits, gradients have the dtype's of the slopes."""
    of_loss = tolerance("contrastive statistics, absolute", dtype)
    assert (answer.loss - expected.loss).abs() <= of_loss * max(1.0, expected.loss.item())
    for name in ("rows", "columns", "log_scale"):
        mine, wanted = getattr(answer, name), getattr(expected, name)
        error = (mine.double().cpu() - wanted).norm() / wanted.norm()
        assert error <= tolerance("contrastive gradients, relative", dtype), f"{name}: {error:.2e}"


@needs_product
@both
@each_size
@pytest.mark.parametrize(("ranks", "block_elements"), [(1, contrastive.BLOCK_ELEMENTS), (3, 5000)])
def test_low_precision_products_stay_close_to_float64(
    V: int, T: int, G: int, E: int, scale: float, ranks: int, block_elements: int, dtype: torch.dtype, as_on_a_gpu: None
) -> None:
    problem = low(_problem(V, T, G // ranks * ranks, E, scale=scale), dtype)
    answer = _by_kernel(problem, ranks=ranks, block_elements=max(block_elements, G * T))
    assert answer.rows.dtype == answer.columns.dtype == torch.float32
    check(answer, _oracle(problem), dtype)


@needs_product
def test_slopes_are_rounded_and_logits_are_not(as_on_a_gpu: None) -> None:
    """Without rounding the errors were float32's, with rounded logits (4e-3 of 14) the loss would be far off."""
    problem = low(_problem(8, 4, 33, 64), torch.bfloat16)
    answer, expected = _by_kernel(problem), _oracle(problem)
    error = (answer.rows.double() - expected.rows).norm() / expected.rows.norm()
    assert error > 10 * tolerance("contrastive, widened, relative", torch.bfloat16)


def launches_and_copies(dtype: torch.dtype, *, column_gradients: bool) -> tuple[int, int]:
    """Return the launches of loss and gradients, and the bytes that copies write beside the results."""
    rows = torch.empty(16, 64, 512, dtype=dtype, device="meta")
    columns = torch.empty(4, 1024, 512, dtype=dtype, device="meta")
    scale, weights = torch.empty((), device="meta"), torch.empty(16, 4, device="meta", dtype=torch.float64)
    with DeviceCounter() as counter:
        partials = contrastive.forward_partials(rows, columns, scale, first_row=0, triton=False)
        contrastive.backward(
            *(rows, columns, scale, weights, partials.row_lse, partials.column_lse),
            first_row=0,
            column_gradients=column_gradients,
            triton=False,
        )
    widened = sum(count.written for (_, name), count in counter.counts.items() if name == "_to_copy")
    return sum(count.launches for count in counter.counts.values()), widened


@needs_product
@pytest.mark.parametrize("column_gradients", [False, True])
def test_columns_are_not_widened_and_launches_do_not_grow(
    column_gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches, copied = launches_and_copies(torch.bfloat16, column_gradients=column_gradients)
    monkeypatch.setattr(contrastive, "SUMS_IN_FLOAT32", False)
    before, copied_before = launches_and_copies(torch.bfloat16, column_gradients=column_gradients)
    assert launches <= before
    columns, slopes = 4 * 4 * 1024 * 512, 2 * 16 * 64 * 4 * 1024
    rows_of_the_scale = 4 * 16 * 64 * 512
    assert copied <= slopes + rows_of_the_scale + 1000
    assert copied_before >= 2 * columns


@needs_product
def test_fake_tensors_of_a_gpu_run_it() -> None:
    with FakeTensorMode():
        rows = torch.empty(2, 3, 16, dtype=torch.bfloat16, device="cuda")
        columns = torch.empty(2, 6, 16, dtype=torch.bfloat16, device="cuda")
        scale = torch.empty((), device="cuda")
        partials = contrastive.forward_partials(rows, columns, scale, first_row=3, triton=False)
        gradients = contrastive.backward(
            *(rows, columns, scale, torch.empty(2, 2, device="cuda"), partials.row_lse, partials.column_lse),
            first_row=3,
            column_gradients=True,
            triton=False,
        )
    assert gradients.columns is not None
    for tensor, like in ((gradients.rows, rows), (gradients.columns, columns)):
        assert (tensor.shape, tensor.dtype, tensor.device) == (like.shape, torch.float32, like.device)


@pytest.mark.gpu
@both
@each_size
def test_on_a_gpu_both_forms_equal_float64(V: int, T: int, G: int, E: int, scale: float, dtype: torch.dtype) -> None:
    problem = _problem(V, T, G, E, scale=scale)
    there, expected = low(problem, dtype, "cuda"), _oracle(low(problem, dtype))
    for triton in (True, False):
        loss, gradients = contrastive_whole.whole_batch(
            *(there.rows, there.columns, there.log_scale.exp(), there.weights), column_gradients=True, triton=triton
        )
        assert gradients.columns is not None
        check(Answer(loss.cpu(), gradients.rows, gradients.columns, gradients.log_scale), expected, dtype)
