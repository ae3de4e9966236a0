"""Every Triton kernel compiled for GPUs that are not here, as it is launched: fit for them; and the check can fail."""

import pytest

from tests.kernels.programs import json_lines, needs_triton

pytestmark = needs_triton

KERNELS = {
    "contrastive statistics",
    "contrastive slopes",
    "add and norm",
    "add and norm backward",
    "gelu backward",
    "stack of gradients",
    "sum of partial sums",
    "patches of 224 pixels",
    "patches of 96 pixels",
    "grey sums",
    "recolour",
    "box blur",
    "optimizer numbers",
    "optimizer update",
    "gradient squares",
}
FEW_REGISTERS = ("patches", "grey", "recolour", "box", "optimizer numbers")


@pytest.mark.slow
def test_the_compiled_kernels_fit_their_gpus() -> None:
    rows = json_lines("-m", "cosmos_scale.testing.launched_kernels", interpret=False)
    assert {row["capability"] for row in rows} == {80, 90, 100}
    names = [row["kernel"] for row in rows if row["capability"] == 90]
    assert len(names) == len(set(names)) == len(rows) / 3
    assert {name.partition(",")[0] for name in names} == KERNELS
    assert [row for row in rows if row["faults"]] == []
    assert all(row["registers"] >= 32 for row in rows if not row["kernel"].startswith(FEW_REGISTERS))
    # Two thirds of an H100's threads at least.
    assert all(row["registers"] <= 80 for row in rows if row["kernel"].startswith(("optimizer", "gradient squares")))


@pytest.mark.slow
def test_the_check_finds_a_kernel_that_does_not_fit() -> None:
    """Wider blocks spill on an A100, and a kernel without a product has none to find."""
    code = """
import json
from cosmos_scale.testing import gpu_compile, launched_kernels
from cosmos_scale.kernels.triton_contrastive import TileSizes
_, slopes = launched_kernels.contrastive_kernels(TileSizes(columns=128, width=512))
found = gpu_compile.compile_for(slopes, 80)
print(json.dumps(gpu_compile.faults(slopes, 80, found)))
print(json.dumps(gpu_compile.faults(slopes, 80, found._replace(spilled=0, multiplies=False, has_trap=True))))
fits = found._replace(spilled=0, shared=0)
print(json.dumps(gpu_compile.faults(slopes, 80, fits)))
print(json.dumps(gpu_compile.faults(slopes, 80, fits._replace(shared=163 * 1024 + 1, tensor_columns=513))))
"""
    spills, others, none, memory = json_lines("-c", code, interpret=False)
    assert any("registers are spilled" in text for text in spills)
    assert {"a bare trap", "no mma.sync"} <= set(others)
    assert none == []
    assert memory == ["166913 bytes of shared memory, 166912 at most", "513 columns of tensor memory, 512 at most"]


@pytest.mark.slow
def test_the_check_finds_shards_that_allow_no_wide_access() -> None:
    code = """
import json
from cosmos_scale.testing import gpu_compile, launched_kernels
for aligned, narrow in zip(launched_kernels.optimizer_kernels(), launched_kernels.optimizer_kernels(aligned=False)):
    if aligned.least_access:
        print(json.dumps(gpu_compile.faults(aligned, 90, gpu_compile.compile_for(narrow, 90))))
"""
    rows = json_lines("-c", code, interpret=False)
    assert len(rows) == 6
    assert all(any("bytes, 16 at least" in text for text in faults) for faults in rows)
