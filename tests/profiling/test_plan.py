"""What a plan says of counts that are known: memory, largest batches, traffic; and what a machine's file may hold."""

import json
from pathlib import Path

import pytest

from cosmos_scale.errors import UserError
from cosmos_scale.profiling import plan as plan_module
from cosmos_scale.profiling.counts import Counts, Exchange, PhaseMemory
from cosmos_scale.profiling.machine import MACHINES, Machine, read_machine
from cosmos_scale.profiling.plan import GIB, OUTSIDE_TORCH, RECOMPUTES, Cluster, Plan, make_plan
from cosmos_scale.profiling.plan_text import head_lines, memory_lines, traffic_lines, work_lines
from cosmos_scale.testing.tiny import tiny_config

MACHINE = Machine("GPU", 10.0, 100.0, 80.0, 1.0, 100.0, 10.0, "made up")
CLUSTER = Cluster(2, 4, MACHINE)
STATES, SAMPLE = GIB, 100 * 2**20  # bytes, and bytes of a sample without recomputation


def counts_of(samples: int, recompute: int) -> Counts:
    """Return counts whose peak is STATES and SAMPLE for each sample, less where blocks are computed again."""
    activations = samples * SAMPLE // (1 + 3 * recompute)
    parts = {"weights": STATES, "activations": activations}
    exchanges = (
        Exchange("loss", "all_gather", "bfloat16", 800, 1, (0.0,)),
        Exchange("backward", "reduce_scatter", "float32", 8000, 2, (0.5, 1.0)),
        Exchange("update", "all_gather", "bfloat16", 4000, 2, (1.0, 1.0)),
        Exchange("refresh", "all_gather", "bfloat16", 4000, 2, (1.0, 1.0)),
    )
    return Counts(
        world_size=8,
        rank=0,
        samples=samples,
        stage=1,
        precision="bf16",
        recompute=recompute,
        micro_batches=1,
        as_gpu=True,
        elements=1000,
        exchanges=exchanges,
        operators=(),
        memory=(PhaseMemory("student", STATES + activations, parts, parts),),
        host_calls={"student": 10},
        seconds=1.0,
    )


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan of known counts, on 2 nodes of 4 GPUs."""

    def counted(runs: list[tuple[object, int]], world_size: int, *, as_gpu: bool) -> list[Counts]:
        return [counts_of(samples, config.train.recompute) for config, samples in runs]  # type: ignore[attr-defined]

    monkeypatch.setattr(plan_module, "count_runs", counted)
    config = tiny_config(precision="bf16", zero={"stage": 1}, train={"global_batch": 32, "schedule_steps": 100})
    return make_plan(config, CLUSTER)


def test_the_largest_batches_fill_the_memory(plan: Plan) -> None:
    room = 10 * GIB - OUTSIDE_TORCH - STATES
    assert plan.largest == {every: room // (SAMPLE // (1 + 3 * every)) for every in RECOMPUTES}
    assert plan.counts.samples == 4


def test_a_ring_moves_each_byte_once_and_nodes_share_what_crosses(plan: Plan) -> None:
    rows = {row.purpose: row for row in plan.traffic()}
    gradients = rows["gradients, float32 reduce-scatter"]
    assert (gradients.calls, gradients.received) == (2, 2 * 8000 * 7 / 8)
    assert gradients.across == 2 * 8000 / 4 / 2  # each of 4 GPUs takes its share in, from one of 2 nodes
    assert gradients.hidden == 0.5  # the second comes when the backward is over
    assert rows["teacher's weights"].hidden == 1.0
    assert rows["student's weights"].hidden == 0.0
    assert CLUSTER.across(800, "all_reduce") == 2 * CLUSTER.across(800, "all_gather")
    assert Cluster(1, 8, MACHINE).across(800, "all_gather") == 0.0


def test_every_number_of_the_plan_is_printed(plan: Plan) -> None:
    text = "\n".join(
        line for section in (head_lines, memory_lines, work_lines, traffic_lines) for line in section(plan)
    )
    for said in (
        "8 x GPU (2 x 4",
        "batch 32 = 8 x 4",
        "peak: student's forward",
        "weights 1.00",
        "activations 100.0 MiB a sample",
        "fits: 37%",
        "largest batch a GPU: 68; ",
        "TFLOP needed",
        "50%, backward",
    ):
        assert said in text, text


def test_what_does_not_fit_is_said(plan: Plan) -> None:
    small = Cluster(2, 4, Machine(**{**MACHINE.__dict__, "memory_gib": 3.0}))
    lines = list(memory_lines(Plan(plan.config, small, plan.counts, {0: None}, plan.work)))
    assert any("DOES NOT FIT: 123%" in line for line in lines)
    assert "largest batch a GPU: none" in lines[-1]


def test_a_machine_goes_through_its_file(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    for machine in (MACHINE, *MACHINES.values()):
        path.write_text(machine.to_json())
        assert read_machine(path) == machine


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "the file: Invalid JSON"),
        ("[]", "the file"),
        (
            json.dumps({**MACHINE.__dict__, "link": -1.0}),
            "link: -1.0; Input should be greater than 0; rule: a file",
        ),
        (json.dumps({**MACHINE.__dict__, "name": 3}), "name: 3; Input should be a valid string"),
        ("{}", "name: Field required"),
    ],
)
def test_a_wrong_machine_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_machine(path)


def test_a_missing_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_machine(tmp_path / "none.json")
