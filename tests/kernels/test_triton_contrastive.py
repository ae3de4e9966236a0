"""The Triton kernels of the contrastive loss: right in Triton's interpreter, and fit for their GPUs when compiled."""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from cosmos_scale.kernels import contrastive
from cosmos_scale.testing.device_counts import DeviceCounter
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

# Of statistics absolute, of gradients relative. float16 rounds slopes to 11 bits before the second product.
TOLERANCES = {"torch.float32": (2e-5, 3e-6), "torch.float16": (2e-5, 1e-3)}


def lines(*arguments: str, interpret: bool, status: int = 0) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=environment | ({"TRITON_INTERPRET": "1"} if interpret else {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == status, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]


def test_the_interpreted_kernels_equal_float64_at_odd_sizes() -> None:
    rows = lines("-m", "tests.kernels.interpret_contrastive", interpret=True)
    assert len(rows) == 5
    for row in rows:
        statistic, gradient = TOLERANCES[row["dtype"]]
        for name, error in row["errors"].items():
            assert error <= (gradient if name in ("rows", "columns", "log_scale") else statistic), (row["case"], name)


@pytest.mark.slow
def test_the_compiled_kernels_fit_their_gpus() -> None:
    code = "from cosmos_scale.testing.gpu_compile import check, kernels; raise SystemExit(check(kernels()))"
    rows = lines("-c", code, interpret=False)
    assert {(row["kernel"], row["capability"]) for row in rows} == {
        (f"contrastive {name}", capability) for name in ("statistics", "slopes") for capability in (80, 90, 100)
    }
    assert [row for row in rows if row["faults"]] == []
    assert all(row["registers"] > 32 for row in rows)


@pytest.mark.slow
def test_the_check_finds_a_kernel_that_does_not_fit() -> None:
    """Wider blocks spill on an A100, and a kernel without a product has none to find."""
    code = """
import json
from cosmos_scale.testing import gpu_compile
from cosmos_scale.kernels.triton_contrastive import TileSizes
_, slopes = gpu_compile.kernels(TileSizes(columns=128, width=512))
found = gpu_compile.compile_for(slopes, 80)
print(json.dumps(gpu_compile.faults(slopes, 80, found)))
print(json.dumps(gpu_compile.faults(slopes, 80, found._replace(spilled=0, multiplies=False, has_trap=True))))
"""
    spills, others = lines("-c", code, interpret=False)
    assert any("registers are spilled" in text for text in spills)
    assert {"a bare trap", "no mma.sync"} <= set(others)


def test_the_kernels_serve_unless_torch_is_asked_for() -> None:
    rows = torch.empty(2, 4, 16, dtype=torch.bfloat16, device="meta")
    scale = torch.empty((), device="meta")
    for triton, launches in ((True, 1), (False, 0)):
        with DeviceCounter() as counter:
            contrastive.forward_partials(rows, rows, scale, first_row=0, triton=triton)
        found = [count.launches for (_, name), count in counter.counts.items() if name == "contrastive_statistics"]
        assert sum(found) == launches


def test_features_of_low_precision_take_the_kernels_on_a_gpu_alone() -> None:
    low, exact = (torch.empty(2, 4, 16, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert not contrastive._is_fused(low, low)
    assert contrastive._is_fused(low.to("meta"), low.to("meta"))
    assert not contrastive._is_fused(exact.to("meta"), exact.to("meta"))
    assert not contrastive._is_fused(low.to("meta"), exact.to("meta"))
