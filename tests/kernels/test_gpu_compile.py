"""Every Triton kernel compiled for GPUs that are not here, as it is launched: fit for them; and the check can fail."""

import importlib.util

import pytest

from tests.kernels.programs import json_lines

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

KERNELS = {
    "contrastive statistics",
    "contrastive slopes",
    "add and norm",
    "add and norm backward",
    "gelu backward",
    "stack of gradients",
    "sum of partial sums",
}


@pytest.mark.slow
def test_the_compiled_kernels_fit_their_gpus() -> None:
    rows = json_lines("-m", "cosmos_scale.testing.gpu_compile", interpret=False)
    assert {row["capability"] for row in rows} == {80, 90, 100}
    names = [row["kernel"] for row in rows if row["capability"] == 90]
    assert len(names) == len(set(names)) == len(rows) / 3
    assert {name.partition(",")[0] for name in names} == KERNELS
    assert [row for row in rows if row["faults"]] == []
    assert all(row["registers"] >= 32 for row in rows)


@pytest.mark.slow
def test_the_check_finds_a_kernel_that_does_not_fit() -> None:
    """Wider blocks spill on an A100, and a kernel without a product has none to find."""
    code = """
import json
from cosmos_scale.testing import gpu_compile
from cosmos_scale.kernels.triton_contrastive import TileSizes
_, slopes = gpu_compile.contrastive_kernels(TileSizes(columns=128, width=512))
found = gpu_compile.compile_for(slopes, 80)
print(json.dumps(gpu_compile.faults(slopes, 80, found)))
print(json.dumps(gpu_compile.faults(slopes, 80, found._replace(spilled=0, multiplies=False, has_trap=True))))
"""
    spills, others = json_lines("-c", code, interpret=False)
    assert any("registers are spilled" in text for text in spills)
    assert {"a bare trap", "no mma.sync"} <= set(others)
