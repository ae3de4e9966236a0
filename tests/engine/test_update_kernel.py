"""The update by Triton kernels inside whole steps, at every layout of ZeRO."""

import importlib.util

import pytest

from tests.kernels.test_triton_contrastive import lines

# A few roundings of float32 (6e-8) of values around 1, of the clipping factor's too.
TOLERANCE = 1e-6


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_a_step_by_the_interpreted_kernels_is_torchs_at_every_layout() -> None:
    rows = lines("-m", "tests.engine.interpret_update", interpret=True)
    assert [row["stage"] for row in rows] == [0, 1, 3]
    for row in rows:
        assert row["updates"] == 1.0
        assert row["difference"] <= TOLERANCE, row["worst"]
