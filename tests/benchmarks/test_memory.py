"""What ranks hold is what the formula says, at every stage; recomputing and micro-batches save memory, as stage 3."""

import functools

import pytest

from benchmarks.memory import STEPS, Case, Measured, Model, formula, measure_all
from cosmos_scale.engine.memory import total_bytes
from cosmos_scale.testing.ranks import run_ranks

# 2.6 million parameters, of which the blocks' matrices are too large to stay whole at stage 3.
MODEL = Model(width=192, layers=2, vocabulary=1024)
TOLERANCE = 0.05
STATES = [Case(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
STATES += [Case(stage, "bf16", offload=True) for stage in (1, 2, 3)]
STATES += [Case(2, "fp32", micro_batches=2), Case(2, "bf16", offload=True, micro_batches=2)]
# Four ranks take over 20 seconds on two cores: a case for each way in which a part may depend on their number.
FOUR_RANKS = [Case(1, "fp32"), Case(3, "fp32"), Case(2, "bf16"), Case(3, "bf16", offload=True)]
FOUR_RANKS += [Case(2, "bf16", offload=True, micro_batches=2)]
RUNS = [(world_size, case) for world_size in (1, 2) for case in STATES]
PEAKS = {title: STEPS[title] for title in ("all kept", "recompute 2", "recompute 1", "4 micro-batches")}


@functools.cache
def results_of(world_size: int) -> dict[Case, list[Measured]]:
    """What each rank measured, by case."""
    cases = {1: [*STATES, *PEAKS.values()], 2: STATES, 4: FOUR_RANKS}[world_size]
    results = run_ranks(measure_all, world_size, cases, MODEL, timeout=300)
    return {case: [result[number] for result in results] for number, case in enumerate(cases)}


@pytest.mark.parametrize(
    ("world_size", "case"), [*RUNS, *(pytest.param(4, case, marks=pytest.mark.slow) for case in FOUR_RANKS)], ids=str
)
def test_states_take_the_formulas_bytes(world_size: int, case: Case) -> None:
    ranks = results_of(world_size)[case]
    rows = formula(case, MODEL, world_size)
    assert max(rank.states for rank in ranks) == pytest.approx(total_bytes(rows), rel=TOLERANCE)
    for part in {row.part for row in rows} - {"padding"}:  # which lies in the other parts, and is little here
        expected = sum(row.nbytes for row in rows if row.part == part)
        # Flags, step counters and caches of a few KiB count as buffers.
        most = max(rank.parts.get(part, 0) for rank in ranks)
        assert most == pytest.approx(expected, rel=TOLERANCE, abs=32 * 1024), part


def test_each_stage_holds_less_than_the_one_before() -> None:
    for precision in ("fp32", "bf16"):
        held = [max(m.states for m in results_of(2)[Case(stage, precision)]) for stage in (0, 1, 2, 3)]
        assert held[0] > held[1] >= held[2] > held[3]


def test_recomputing_and_micro_batches_lower_the_peak() -> None:
    peaks = {title: results_of(1)[case][0].step for title, case in PEAKS.items()}
    assert peaks["recompute 2"] < 0.9 * peaks["all kept"]
    assert peaks["recompute 1"] < 0.9 * peaks["recompute 2"]
    assert peaks["4 micro-batches"] < 0.7 * peaks["all kept"]


def test_stage_3_gives_up_gathered_weights_before_the_backward() -> None:
    """Up to a share of the weights may stay, since the backward begins with them; torch's linear would keep 0.9."""
    weights = sum(row.nbytes for row in formula(Case(0, "fp32"), MODEL, 1) if row.part == "weights")
    sharded, whole = (results_of(2)[Case(stage, "fp32")][0].forward for stage in (3, 2))
    assert sharded - whole <= 0.5 * weights
