"""The paper model divides counts by rates as it says; the counts are those of a real step's code."""

from typing import Any

import pytest
import torch

from benchmarks.device_counts import NARROW, case_config
from benchmarks.paper_model import CHIPS, Chip, StepWork, attention_flops, fp8_figures, paper_step
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.profiling.collectives import Collective
from cosmos_scale.profiling.operators import GROUPS, Count
from cosmos_scale.profiling.planned_batch import planned_lengths
from cosmos_scale.profiling.rates import HOPEFUL, Assumed
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.traffic import count_losses, count_traffic, exposed_share

# 100 TFLOP/s, 1 TB/s, 100 GB/s inside a node, 10 GB/s between nodes, all of it reached.
CHIP = Chip("chip", peak=200, products=100, memory=1, link=100, network=10)
ALL_REACHED = Assumed(products=1, attention=1, memory=1, traffic=1, launch_us=10, collective_us=0, exposed=0.5)
NOTHING = dict.fromkeys(GROUPS, Count())
WORLD_SIZE = 8


def work_of(**changes: Any) -> StepWork:
    """Work of 1 TFLOP of products and nothing else, with changes."""
    products = NOTHING | {"products": Count(launches=1, flops=10**12)}
    phases = {"student": products, "teacher": NOTHING, "backward": NOTHING}
    phases |= {"gradients": NOTHING, "update": NOTHING, "refresh": NOTHING}
    losses = dict.fromkeys((1, 8, 16), ((), NOTHING))
    whole = StepWork(
        phases, losses, attention=0, needed_loss=0, needed=10**12, collectives=(), samples=10, phases_alone=phases
    )
    return whole._replace(**changes)


def test_products_take_their_operations_at_the_rate_of_products() -> None:
    step = paper_step(work_of(), CHIP, 1, ALL_REACHED)
    assert step.parts["products"] == pytest.approx(10.0)  # 1 TFLOP at 100 TFLOP/s
    assert step.ms == pytest.approx(10.0)
    assert step.samples_per_second == pytest.approx(1000.0)
    assert step.mfu == pytest.approx(0.5)  # 1 TFLOP in 10 ms is 100 of 200 TFLOP/s


def test_a_part_takes_the_longer_of_operations_and_bytes() -> None:
    much_read = NOTHING | {"products": Count(read=20 * 10**9, flops=10**12)}
    phases = dict(work_of().phases) | {"student": much_read}
    assert paper_step(work_of(phases=phases), CHIP, 1, ALL_REACHED).parts["products"] == pytest.approx(20.0)


def test_a_host_that_launches_longer_than_the_device_works_sets_the_time() -> None:
    many = NOTHING | {"products": Count(launches=5000, flops=10**12)}
    phases = dict(work_of().phases) | {"student": many}
    assert paper_step(work_of(phases=phases), CHIP, 1, ALL_REACHED).ms == pytest.approx(50.0)


def test_ranks_share_the_update_and_not_the_gradients() -> None:
    a_gigabyte = NOTHING | {"copies": Count(read=10**9)}
    phases = dict(work_of().phases) | {"gradients": a_gigabyte, "update": a_gigabyte}
    assert paper_step(work_of(phases=phases), CHIP, 1, ALL_REACHED).parts["gradients, update"] == pytest.approx(2.0)
    assert paper_step(work_of(phases=phases), CHIP, 8, ALL_REACHED).parts["gradients, update"] == pytest.approx(1.125)


@pytest.mark.parametrize(
    ("kind", "gpus", "ms"),
    [
        ("all_gather", 8, 8.75),  # 7/8 of a gigabyte at 100 GB/s
        ("all_reduce", 8, 17.5),
        ("all_gather", 16, 8.75 + 6.25),  # and half of an eighth of it at 10 GB/s
    ],
)
def test_a_collective_crosses_links_and_network(kind: str, gpus: int, ms: float) -> None:
    gigabyte = Collective("refresh", kind, torch.bfloat16, 10**9 // 2)
    step = paper_step(work_of(collectives=[gigabyte]), CHIP, gpus, ALL_REACHED)
    assert step.parts["traffic"] == pytest.approx(ms)


def test_the_backward_hides_a_share_of_its_traffic() -> None:
    gradients = Collective("backward", "all_gather", torch.bfloat16, 10**9 // 2)
    step = paper_step(work_of(collectives=[gradients]), CHIP, 8, ALL_REACHED)
    assert step.parts["traffic"] == pytest.approx(8.75 / 2)


def test_attention_counts_pairs_of_tokens() -> None:
    """One sample of ViT-B/16: 2 crops of 197 tokens and 6 of 37, 8 captions of 10 tokens, half of whose pairs count."""
    config = case_config("vitb16", 1)
    lengths = torch.full((config.data.captions.count, 1), 10)
    captions = [77 if config.model.text_padding == "attend" else 10] + [10] * 7
    student = 768 * (2 * 197**2 + 6 * 37**2) + 512 * sum(length * (length + 1) // 2 for length in captions)
    teacher = 768 * 2 * 197**2 + 512 * 2 * 55
    assert attention_flops(config, lengths) == 4 * 12 * (3.5 * student + teacher)


def test_fp8_halves_the_products_of_blocks_and_rounds_their_inputs() -> None:
    """The teacher of a sample has 2 crops of 197 tokens; a block has 12 width^2 weights and inputs of 7 widths."""
    work = work_of(samples=1, losses={8: ((), NOTHING)})
    found = {figure.name: figure.value for figure in fp8_figures("vitb16", work)}
    chip, tokens = CHIPS[1], 2 * 197
    saved = 12 * 12 * 2 * tokens * 768**2 / (chip.products * 1e9 * HOPEFUL.products) / 2
    assert found["fp8_saved_teacher_vitb16_1_hopeful"] == pytest.approx(saved)
    rounding = 12 * tokens * 7 * 768 * 3 / (chip.memory * 1e9 * HOPEFUL.memory)
    assert found["fp8_rounding_teacher_vitb16_1_hopeful"] == pytest.approx(rounding)
    assert found["fp8_share_teacher_vitb16_1"] < found["fp8_share_student_vitb16_1"] < 0.6


def test_counted_traffic_is_that_of_the_code() -> None:
    """At stage 1 both models' weights and norms are gathered once a step, and the gradients' traffic is bounded."""
    config = case_config("vitb16", WORLD_SIZE, *NARROW, f"train.global_batch={WORLD_SIZE}")
    ((seen, elements),) = run_ranks(count_traffic, 1, config, WORLD_SIZE)
    for phase in ("update", "refresh"):
        weights = sum(x.nbytes for x in seen if x.phase == phase and x.dtype == torch.bfloat16)
        assert weights == pytest.approx(2 * elements, rel=1e-3), phase
    # The norms of both models and the scales, in float32: shards are cut through them, and each rank gives as much.
    (full_values,) = (x for x in seen if x.kind == "all_gather" and x.dtype == torch.float32)
    norms = sum(norm.weight.numel() + norm.bias.numel() for norm in CosmosModel(config.model).norms().values())
    assert 2 * norms + 2 <= full_values.elements <= 1.5 * (2 * norms + 2)
    gradients = [x for x in seen if x.phase == "backward"]
    assert sum(x.nbytes for x in gradients) <= 4 * elements * 1.001
    assert {x.kind for x in seen if x.phase in ("student", "teacher")} == set()


def test_the_loss_grows_with_the_ranks() -> None:
    config = case_config("vitb16", 32)
    ((few, few_groups), (many, many_groups)) = run_ranks(count_losses, 1, config, (8, 128))[0]
    assert [x.kind for x in few] == [x.kind for x in many]
    assert len(many) == 5
    assert many[0].elements == 16 * few[0].elements
    assert many_groups["products"].flops == 16 * few_groups["products"].flops


@pytest.mark.parametrize("run", ["vitb32", pytest.param("vitb16", marks=pytest.mark.slow)])
def test_little_traffic_is_left_when_the_backward_ends(run: str) -> None:
    """Of real sizes, so many gradients are in buckets that fill up only in the last 20th of the backward's products."""
    config = case_config(run, 1)
    share = exposed_share(config, planned_lengths(config, 1), 8)
    assert share <= 0.16
    assert HOPEFUL.exposed == pytest.approx(share, abs=0.01)


def test_without_the_order_of_the_backward_more_would_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CosmosModel, "image_tower_parameters", lambda model: [])
    config = case_config("vitb32", 1)
    assert exposed_share(config, planned_lengths(config, 1), 8) > 0.25
