"""The Triton kernels of the contrastive loss: right in Triton's interpreter, and taken where they serve."""

import torch

from cosmos_scale.kernels import contrastive
from cosmos_scale.profiling.operators import DeviceCounter
from cosmos_scale.testing.tolerances import tolerance
from tests.kernels.programs import json_lines, needs_triton

pytestmark = needs_triton

GRADIENTS = ("rows", "columns", "log_scale")


def test_the_interpreted_kernels_equal_float64_at_odd_sizes() -> None:
    rows = json_lines("-m", "tests.kernels.interpret_contrastive", interpret=True)
    assert len(rows) == 7
    for row in rows:
        for name, error in row["errors"].items():
            measure = "gradients, relative" if name in GRADIENTS else "statistics, absolute"
            assert error <= tolerance(f"contrastive {measure}", row["dtype"]), (row["case"], name)


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
