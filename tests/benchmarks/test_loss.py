"""The forms that the loss benchmark compares compute the same; memory is counted right, and is little."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.loss import FORMS, Answer, Problem, published, random_problem
from cosmos_scale.testing.allocation import peak_bytes
from tests.conftest import REPOSITORY

MOST_MEMORY = 0.1  # of the published form's


# The trainer's form has two ways: for small pairs, and for pairs as large as the benchmark's.
@pytest.mark.parametrize("samples", [20, 150])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_all_forms_compute_the_same(form: Callable[[Problem], Answer], samples: int) -> None:
    problem = random_problem(3, 2, samples, 32)
    answer, expected = form(problem), published(Problem(*(tensor.double() for tensor in problem)))
    # Float32 against float64: logits near 14 carry rounding of 1e-6, and so do softmaxes.
    for name, actual, wanted in zip(Answer._fields, answer, expected, strict=True):
        assert (actual - wanted).norm() <= 6e-6 * wanted.norm(), name


def test_peak_counts_what_is_held_at_once() -> None:
    kilobyte = 256  # float32 elements

    def call() -> torch.Tensor:
        first = torch.empty(kilobyte)
        second = torch.empty(2 * kilobyte)
        del first
        third = torch.empty(kilobyte // 2)
        del second, third
        return torch.empty(2 * kilobyte)

    assert peak_bytes(call) == 3 * 1024


def test_peak_counts_inside_operations_and_in_backward() -> None:
    x = torch.ones(100, 100, requires_grad=True)
    # What exp returns is saved for backward, where the gradient of the sum and that of x join it, the former expanded.
    assert peak_bytes(lambda: torch.autograd.grad(x.exp().sum(), x)) >= 2 * 100 * 100 * 4
    # A sum in another dtype converts first.
    x = torch.ones(100, 100, dtype=torch.bfloat16)
    assert peak_bytes(lambda: x.sum(dtype=torch.float64)) >= 100 * 100 * 8


def test_the_loss_benchmark_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "loss.json"
    finished = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / "loss.py"), "--rounds", "1", "--json", str(file)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    figures = {row["name"]: row for row in json.loads(file.read_text())}
    assert list(figures) == ["loss_time_ratio", "loss_time_ratio_transposed", "loss_memory_ratio"]
    assert all(row["value"] > 0 for row in figures.values())
    # Allocations are the same on every machine; times are not, so no test bounds them.
    assert figures["loss_memory_ratio"]["value"] <= MOST_MEMORY
