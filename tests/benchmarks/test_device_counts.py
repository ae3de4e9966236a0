"""A step does not come to ask more of a GPU than it did."""

import pytest

from benchmarks.device_counts import ENGINE_PHASES, NARROW, block_counts, case_config, count, figures
from cosmos_scale.profiling.operators import total
from cosmos_scale.testing.device_counts import count_update
from cosmos_scale.testing.ranks import run_ranks


@pytest.mark.slow
def test_a_step_asks_no_more_of_a_gpu_than_it_did() -> None:
    """The limits are what was counted, rounded up. Whoever gets below lowers them."""
    ((engine, elements),) = run_ranks(count_update, 1, case_config("vitb16", 1, *NARROW), timeout=300.0)
    assert tuple(engine) == ENGINE_PHASES
    phases = count("vitb16", 64, engine, elements)
    launches, pointwise, products = figures("vitb16", 64, phases)
    assert launches.value <= 1088
    assert total(phases["loss"].values()).launches <= 40
    assert pointwise.value <= 56.0
    assert 27.1 < products.value < 27.2


def test_launches_of_blocks_are_counted_by_tower() -> None:
    """Both towers' blocks are the same operators: 8 forward and 19 backward."""
    by_phase = {"student": 12 * 8, "teacher": 12 * 8, "backward": 12 * 19}
    found = block_counts("vitb16", 1)
    assert {tower: {phase: count.launches for phase, count in phases.items()} for tower, phases in found.items()} == {
        "image": by_phase,
        "text": by_phase,
    }
    tokens, width = 2 * 197, 768  # products of a block: 12 width x width matrices
    assert found["image"]["teacher"].flops == 12 * 12 * 2 * tokens * width**2
