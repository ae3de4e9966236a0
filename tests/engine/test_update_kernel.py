"""The update by Triton kernels inside whole steps, at every layout of ZeRO."""

import pytest

from cosmos_scale.testing.tolerances import tolerance
from tests.kernels.programs import json_lines, needs_triton

TOLERANCE = tolerance("adamw_ema in a step", "float32")


@pytest.mark.slow
@needs_triton
def test_a_step_by_the_interpreted_kernels_is_torchs_at_every_layout() -> None:
    rows = json_lines("-m", "tests.engine.interpret_update", interpret=True)
    assert [row["stage"] for row in rows] == [0, 1, 3]
    for row in rows:
        assert row["updates"] == 1.0
        assert row["difference"] <= TOLERANCE, row["worst"]
