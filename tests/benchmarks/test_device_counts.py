"""A step does not come to ask more of a GPU than it did."""

from collections import Counter

import pytest

from benchmarks.device_counts import (
    ENGINE_PHASES,
    NARROW,
    RANKS,
    STEP_PHASES,
    block_counts,
    case_config,
    count,
    figures,
    rank_figure,
)
from cosmos_scale.profiling.counts import Counts
from cosmos_scale.profiling.fake_run import count_run
from cosmos_scale.profiling.operators import total
from cosmos_scale.profiling.planned_batch import planned_lengths
from cosmos_scale.testing.device_counts import count_step, count_update
from cosmos_scale.testing.ranks import run_ranks

SAMPLES = 2
ON_GPU = "model.attention=torch_varlen"  # NARROW is for CPUs
TWO_LAYERS = (*NARROW, "model.vision.layers=2", "model.text.layers=2")


@pytest.mark.slow
def test_a_step_asks_no_more_of_a_gpu_than_it_did() -> None:
    """The limits are what was counted, rounded up. Whoever gets below lowers them."""
    ((engine, elements),) = run_ranks(count_update, 1, case_config("vitb16", 1, *NARROW), timeout=300.0)
    assert tuple(engine) == ENGINE_PHASES
    phases = count("vitb16", 64, engine, elements)
    launches, pointwise, products = figures("vitb16", 64, phases)
    assert launches.value <= 1089
    assert total(phases["loss"].values()).launches <= 40 + 2  # and copies of both scales, which a step returns
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


def launches_of(counts: Counts) -> Counter[tuple[str, str]]:
    """Launches by phase and operator."""
    found: Counter[tuple[str, str]] = Counter()
    for operator in counts.operators:
        found[operator.phase, operator.name] += operator.launches
    return found


@pytest.fixture(scope="module")
def planned() -> list[Counter[tuple[str, str]]]:
    """What a plan counts of a rank alone and of one of RANKS ranks."""
    config = case_config("vitb16", SAMPLES, *TWO_LAYERS, ON_GPU)
    return [launches_of(count_run(config, ranks, SAMPLES)) for ranks in (1, RANKS)]


def test_a_plan_of_one_rank_counts_the_same_launches(planned: list[Counter[tuple[str, str]]]) -> None:
    """The plan's code is another: the whole of train_step on an engine. Its backward holds what is "gradients" here."""
    config = case_config("vitb16", SAMPLES, *TWO_LAYERS, ON_GPU)
    counted = count_step(config, planned_lengths(config, SAMPLES)).counts
    ((engine, _),) = run_ranks(count_update, 1, case_config("vitb16", 1, *TWO_LAYERS), timeout=300.0)
    alone = planned[0]
    for phase in STEP_PHASES[:-1]:
        mine = {name: found.launches for (where, name), found in counted.items() if where == phase}
        assert mine == {name: count for (where, name), count in alone.items() if where == phase}, phase
    by_phase = {phase: total(groups.values()).launches for phase, groups in engine.items()}
    backward = sum(found.launches for (where, _), found in counted.items() if where == "backward")
    for phase, launches in (
        ("backward", backward + by_phase["gradients"]),
        ("update", by_phase["update"]),
        ("refresh", by_phase["refresh"]),
    ):
        assert launches == sum(count for (where, _), count in alone.items() if where == phase), phase


def test_other_ranks_add_exchanges_of_loss_gradients_and_norms(planned: list[Counter[tuple[str, str]]]) -> None:
    alone, one_of_many = planned
    assert {place: one_of_many[place] - count for place, count in alone.items() if one_of_many[place] != count} | {
        place: count for place, count in one_of_many.items() if place not in alone
    } == {
        # Columns and statistics are packed for the exchange, and put together after it.
        ("loss", "clone"): 4,
        ("loss", "cat"): 1,
        ("loss", "sub_"): 1,
        ("loss", "exp_"): 1,
        ("loss", "log_"): 1,
        ("loss", "add_"): 1,
        ("loss", "_foreach_mul_"): 1,  # of the features' gradients, by the ranks
        # Gradients are copied into each bucket, whose end is filled with zeros, and divided by the ranks.
        ("backward", "_foreach_copy_"): 3,
        ("backward", "zero_"): 1,
        ("backward", "_foreach_mul_"): 1,
        # What norms and scales read in float32 comes from all ranks.
        ("update", "cat"): 1,
        ("update", "index_select"): 1,
    }


@pytest.mark.slow
def test_launches_of_one_of_many_ranks_are_printed_beside_those_of_one_alone() -> None:
    ((engine, elements),) = run_ranks(count_update, 1, case_config("vitb16", 1, *NARROW), timeout=300.0)
    figure = rank_figure("vitb16", 64, count("vitb16", 64, engine, elements))
    assert figure.value <= 1112
    assert "loss +12, backward +9, update +2" in figure.note
