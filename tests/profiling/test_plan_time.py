"""A planned step's time is that of its counts at the machine's rates, worked out by hand."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from cosmos_scale.config import RunConfig
from cosmos_scale.profiling import remedies as remedies_module
from cosmos_scale.profiling.counts import Counts, Exchange, OperatorCount, PhaseMemory
from cosmos_scale.profiling.machine import MACHINES, Machine
from cosmos_scale.profiling.plan import GIB, OUTSIDE_TORCH_ON_CPU, Cluster, Plan, StepOperations
from cosmos_scale.profiling.plan_files import PICTURE, TABLE, plan_tree, write_sweep
from cosmos_scale.profiling.plan_text import head_lines, memory_lines, traffic_lines, work_lines
from cosmos_scale.profiling.plan_time import CORE_SAMPLES, batch_bytes, loaders, planned_time, step_time
from cosmos_scale.profiling.plan_time_text import PlannedRun, remedy_lines, scaling_lines, time_lines
from cosmos_scale.profiling.rates import CAUTIOUS, HOPEFUL, KERNEL_SECONDS, UNCALIBRATED, Assumed, AssumedRates
from cosmos_scale.profiling.remedies import count_variants, remedies, scaling
from cosmos_scale.profiling.scaled_counts import scaled_counts
from cosmos_scale.report.plan_part import PLAN_FILE, add_plans
from cosmos_scale.report.profile_part import Profiled
from cosmos_scale.report.records import read_runs
from cosmos_scale.testing.tiny import tiny_config
from cosmos_scale.words import COLUMNS
from tests.profiling.test_calibration import CALIBRATION
from tests.report.run_folders import train_record, write_run

# 100 TFLOP/s, 1 TB/s, 100 GB/s inside a node, 10 GB/s between nodes, all of it reached.
MACHINE = Machine("GPU", 10.0, 200.0, 100.0, 1.0, 100.0, 10.0, "made up", cores=5.0, pcie=1.0)
REACHED = Assumed(products=1, attention=1, memory=1, traffic=1, launch_us=10, collective_us=0, exposed=0.0)
CLUSTER = Cluster(2, 4, MACHINE)
MS_PRODUCT, MS_BYTES = 10**11, 10**9  # operations and bytes of a ms


def product(phase: str, ms: float, dtype: str = "bfloat16") -> OperatorCount:
    return OperatorCount(phase, "products", "mm", (1, 8, 8, 8), dtype, 1, 0, 0, round(ms * MS_PRODUCT))


def moved(phase: str, ms: float) -> OperatorCount:
    return OperatorCount(phase, "copies", "cat", (), "bfloat16", 1, round(ms * MS_BYTES), 0, 0)


def counts_of(
    *operators: OperatorCount, exchanges: tuple[Exchange, ...] = (), stage: int = 1, samples: int = 4
) -> Counts:
    return Counts(
        world_size=8,
        rank=0,
        samples=samples,
        stage=stage,
        precision="bf16",
        recompute=0,
        micro_batches=1,
        as_gpu=True,
        elements=1000,
        exchanges=exchanges,
        operators=operators,
        memory=(PhaseMemory("student", samples * GIB // 4, {"activations": samples * GIB // 4}, {}),),
        host_calls={"student": 10},
        seconds=1.0,
    )


def config_of(**changes: object) -> RunConfig:
    train = {"global_batch": 32, "schedule_steps": 100}
    return tiny_config(precision="bf16", zero={"stage": 1}, train=train, **changes)


def test_parts_are_counts_at_rates() -> None:
    counts = counts_of(
        product("student", 3),
        moved("backward", 2),
        product("loss", 1),
        moved("update", 0.5),
        product("teacher", 1, "float32"),
    )
    time = step_time(config_of(), counts, CLUSTER, AssumedRates(MACHINE, REACHED))
    expected = {"products": 5e-3, "attention": 0.0, "element-wise": 2e-3, "loss": 1e-3, "update": 0.5e-3}
    assert time.device == pytest.approx(expected)  # TF32's rate is half of bf16's
    assert time.computed == pytest.approx(8.5e-3)
    assert time.host == pytest.approx(5 * 10e-6)
    assert time.data == pytest.approx(4 / CORE_SAMPLES / 4)  # four loaders: 5 cores less one
    assert time.copy == pytest.approx(4 * batch_bytes(config_of()) / 1e9)
    assert time.limit == "GPU"


@pytest.mark.parametrize(
    ("gpus", "workers", "cores", "slower"),
    [(1, None, 2, 1.0), (2, None, 0, 1.0), (1, 1, 1, 1.0), (1, 5, 2, 1.0), (4, None, 0, 4 / 3), (1, 0, 0, 1.0)],
)
def test_ranks_on_cpus_share_the_cores_of_a_host(gpus: int, workers: int | None, cores: int, slower: float) -> None:
    """A host of 3 cores, measured with one thread: loaders have what the ranks' computation leaves."""
    host = replace(MACHINE, cores=3.0, calibration=CALIBRATION)
    cluster, config = Cluster(8 // gpus, gpus, host), config_of(data={"workers": workers})
    counts = counts_of(product("student", 3))
    rates = AssumedRates(MACHINE, REACHED)
    time = step_time(config, counts, cluster, replace(rates, serial=True))
    assert loaders(config, cluster) == cores
    assert time.data == pytest.approx(4 / CORE_SAMPLES / max(1, cores))
    computed = 3e-3 * slower
    assert time.computed == pytest.approx(computed)
    together = computed + time.host + time.data if cores == 0 else max(computed + time.host, time.data)
    assert time.seconds == pytest.approx(together)


def test_a_kernel_takes_its_least_time() -> None:
    time = step_time(config_of(), counts_of(moved("student", 0)), CLUSTER, AssumedRates(MACHINE, REACHED))
    assert time.device["element-wise"] == KERNEL_SECONDS


def test_a_collective_goes_inside_and_across() -> None:
    rates = AssumedRates(MACHINE, REACHED)
    inside, across = 0.75 * 8e8 / 100e9, 8e8 / 4 * 0.5 / 10e9
    assert rates.exchange_seconds("all_gather", 800_000_000, 2, 4) == pytest.approx(inside + across)
    assert rates.exchange_seconds("all_reduce", 800_000_000, 2, 4) == pytest.approx(2 * (inside + across))
    assert rates.exchange_seconds("all_reduce", 800_000_000, 1, 1) == 0.0
    late = AssumedRates(MACHINE, REACHED._replace(collective_us=100))
    assert late.exchange_seconds("all_gather", 0, 4, 4) == pytest.approx(200e-6)  # two doublings of the nodes


@pytest.mark.parametrize(
    ("phase", "done", "hidden_ms"),
    [
        ("backward", (0.0,), 8.0),  # begins with the backward's 10 ms and ends before them
        ("backward", (0.5,), 5.0),
        ("backward", (1.0,), 0.0),
        ("backward", (0.5, 0.5), 5.0),  # the second waits for the first
        ("refresh", (1.0,), 4.0),  # beside the student's 4 ms
        ("update", (0.0,), 0.0),
    ],
)
def test_other_work_hides_collectives(phase: str, done: tuple[float, ...], hidden_ms: float) -> None:
    nbytes = round(8e-3 / (0.75 / 100e9 + 0.125 / 10e9))  # of 8 ms
    exchange = Exchange(phase, "all_gather", "bfloat16", nbytes, len(done), done)
    counts = counts_of(product("backward", 10), product("student", 4), exchanges=(exchange,))
    time = step_time(config_of(), counts, CLUSTER, AssumedRates(MACHINE, REACHED))
    assert time.network == pytest.approx(len(done) * 8e-3, rel=1e-4)
    assert time.hidden == pytest.approx(hidden_ms * 1e-3, rel=1e-3, abs=1e-9)
    half = step_time(config_of(), counts, CLUSTER, AssumedRates(MACHINE, REACHED._replace(exposed=0.5)))
    assert half.hidden == pytest.approx(time.hidden / 2)


def test_a_step_takes_as_long_as_the_longest() -> None:
    time = step_time(config_of(), counts_of(product("student", 30)), CLUSTER, AssumedRates(MACHINE, REACHED))
    assert replace(time, host=1.0).limit == "host dispatch"
    assert replace(time, data=1.0).limit == "data CPUs"
    assert replace(time, copy=1.0, host=0.5).limit == "PCIe"
    assert replace(time, network=1.0).limit == "network"
    assert replace(time, network=1.0, hidden=1.0).limit == "GPU"
    assert replace(time, host=1.0, serial=True).seconds == pytest.approx(1.0 + time.computed)


def test_the_range_holds_what_is_expected() -> None:
    for machine in MACHINES.values():
        time = planned_time(config_of(), counts_of(product("student", 300)), Cluster(1, 8, machine))
        assert time.rates[0] < time.rate < time.rates[1]
        assert time.fastest.computed == pytest.approx(30.0 / machine.products / HOPEFUL.products)
        assert time.slowest.computed == pytest.approx(UNCALIBRATED * 30.0 / machine.products / CAUTIOUS.products)


def test_counts_scale_with_the_ranks() -> None:
    counts = counts_of(
        product("student", 3),
        product("loss", 1),
        moved("update", 1),
        exchanges=(
            Exchange("loss", "all_gather", "bfloat16", 80_000, 1),
            Exchange("loss", "all_reduce", "float64", 40, 1),
            Exchange("backward", "reduce_scatter", "float32", 80_000, 1, (0.5,)),
        ),
    )
    more = scaled_counts(counts, 32)
    assert [found.nbytes for found in more.exchanges] == [320_000, 40, 80_000]
    assert [found.flops // MS_PRODUCT for found in more.operators[:2]] == [3, 4]
    assert more.operators[2].nbytes == MS_BYTES // 4
    assert scaled_counts(replace(counts, stage=0), 32).operators[2].nbytes == MS_BYTES
    assert scaled_counts(counts, 1).exchanges == ()
    assert scaled_counts(more, 8) == counts
    with pytest.raises(ValueError, match="1 rank exchanges nothing"):
        scaled_counts(replace(counts, world_size=1), 8)


def planned_run(monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> PlannedRun:
    """Return a planned run: 4 samples a rank take 8 ms at every stage but 3, where they take 16."""

    def counted(runs: list[tuple[RunConfig, int]], world_size: int, *, as_gpu: bool) -> list[Counts]:
        found = []
        for config, samples in runs:
            ms = 4 + samples * (3 if config.zero.stage == 3 else 1)
            found.append(counts_of(product("student", ms), stage=config.zero.stage, samples=samples))
        return found

    monkeypatch.setattr(remedies_module, "count_runs", counted)
    config = config_of()
    plan = Plan(config, cluster, counts_of(product("student", 8)), {0: 8}, StepOperations(10**12, 0, 0, 10**12))
    variants = count_variants(plan)
    time = planned_time(config, plan.counts, cluster)
    return PlannedRun(plan, time, 1000, remedies(plan, time, variants), scaling(plan, variants, (1, 8, 12, 1024)))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> PlannedRun:
    """A planned run on 8 GPUs."""
    return planned_run(monkeypatch, CLUSTER)


def test_remedies_are_ranked_by_gain(run: PlannedRun) -> None:
    found = {remedy.outlook.change: remedy for remedy in run.remedies}
    assert "zero.stage=1" not in found  # the run itself
    assert found["zero.stage=3"].verdict == "don't"
    assert found["zero.stage=3"].gain == pytest.approx(-0.5)
    assert found["zero.stage=2"].verdict == "no gain"
    fewer = found["the same batch on 4 GPUs, 8 a GPU"]
    assert fewer.verdict == "do"
    assert fewer.gain == pytest.approx(2 * 8 / 12 - 1)
    assert [remedy.gain for remedy in run.remedies] == sorted((remedy.gain for remedy in run.remedies), reverse=True)
    small = replace(run.plan.cluster, machine=replace(MACHINE, memory_gib=1.0))
    assert not replace(fewer.outlook, cluster=small).fits


def test_a_report_shows_a_plan_beside_the_runs_steps(run: PlannedRun, tmp_path: Path) -> None:
    times = [0.1, 0.2, 0.3]
    records = [train_record(step, step_seconds_max=times[step - 1], peak_memory_gib=3.0) for step in (1, 2, 3)]
    folder = write_run(tmp_path / "run", records)
    (folder / PLAN_FILE).write_text(json.dumps(plan_tree(run)))
    notes: list[str] = []
    found = Profiled()
    add_plans(found, read_runs([folder]), notes)
    (table,) = found.speed
    rows = {row[0]: list(row[1:]) for row in table.rows}
    planned = 1e3 * run.time.expected.seconds
    assert rows["step, ms"][0] == f"{planned:,.4g}"
    assert rows["step, ms"][2:] == ["200", f"{200 / planned - 1:+.1%}"]
    assert rows["MFU, %"][2:] == ["", ""]  # a CPU's records have none
    assert rows["peak memory of a rank, GiB"][2] == "3"
    assert "8 x " in table.note
    (held,), (bars,) = found.memory, found.memory_figures
    assert [row[0] for row in held.rows] == ["activations", "outside torch", "all"]
    assert "activations" in bars.said
    (folder / PLAN_FILE).write_text('{"time": {}}')
    without = Profiled()
    add_plans(without, read_runs([folder]), notes)
    assert without == Profiled()
    assert notes == ["some_run: plan.json cannot be used: KeyError: 'expected'."]


def test_a_plan_for_cpus_names_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of a host share its memory, and hold Python and its libraries beside their tensors."""
    machine = replace(MACHINE, name="a CPU, 2 threads", memory_gib=20.0, calibration=CALIBRATION)
    run = planned_run(monkeypatch, Cluster(2, 4, machine))
    plan_sections = (head_lines, memory_lines, work_lines, traffic_lines)
    lines = [line for section in plan_sections for line in section(run.plan)]
    lines += [line for section in (time_lines, remedy_lines, scaling_lines) for line in section(run)]
    text = "\n".join(lines)
    assert "GPU" not in text, text
    assert "CUDA" not in text, text
    assert "bottleneck: CPU" in text
    assert "of 5 GiB, a rank's share of a host's 20" in text
    assert "the same batch on 4 ranks, 8 a rank" in text
    outside = next(line for line in lines if "outside torch" in line)
    assert float(outside.split()[-1]) == pytest.approx(OUTSIDE_TORCH_ON_CPU / GIB, abs=0.01)
    assert run.plan.free == 5 * GIB - OUTSIDE_TORCH_ON_CPU
    assert plan_tree(run)["memory"]["outside_torch_bytes"] == OUTSIDE_TORCH_ON_CPU


def test_plans_are_told_in_lines_and_files(run: PlannedRun, tmp_path: Path) -> None:
    sizes = sorted({outlook.cluster.world_size for outlook in run.scaling})
    assert sizes == [1, 8, 12, 1024]
    text = "\n".join(line for section in (time_lines, remedy_lines, scaling_lines) for line in section(run))
    assert "bottleneck: GPU" in text
    assert "1,000 steps" in text
    assert "zero.stage=3" in text
    assert "unknown" in "\n".join(time_lines(replace(run, steps=None)))
    tree = json.loads(json.dumps(plan_tree(run)))
    assert tree["time"]["expected"]["device_ms"]["products"] == pytest.approx(1e3 * run.time.expected.computed)
    assert tree["run"]["gpu_hours"] == pytest.approx(1000 * run.time.expected.seconds / 3600 * 8)
    write_sweep(run.scaling, "a title", tmp_path)
    with (tmp_path / TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(run.scaling)
    assert {int(row["gpus"]) for row in rows} == set(sizes)
    assert all(math.isfinite(float(row["step_ms"])) for row in rows)
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_a_plan_stands_whole_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large numbers, long names and all remedies: no line is wider than a terminal, and no cell is cut."""
    parts = dict.fromkeys(("weights", "teacher", "moments", "masters", "average", "gradients", "activations"), GIB)
    exchanges = tuple(
        Exchange(phase, kind, "float32", 9 * 10**8, 99, (0.85,))
        for phase in ("student", "teacher", "loss", "backward", "update", "refresh")
        for kind in ("all_gather", "reduce_scatter")
    )
    run = planned_run(monkeypatch, CLUSTER)
    memory = (PhaseMemory("student", 7 * GIB, parts, {}),)
    counts = replace(counts_of(product("student", 10_000), exchanges=exchanges, stage=3), memory=memory)
    plan = replace(run.plan, counts=counts)
    waiting = replace(run.time, expected=replace(run.time.expected, data=2 * run.time.expected.seconds))
    variants = count_variants(plan)
    helps = [*remedies(plan, waiting, variants), *run.remedies]
    full = PlannedRun(plan, planned_time(plan.config, counts, CLUSTER), 1_000_000, helps, scaling(plan, variants))
    cpu = replace(MACHINE, name="a CPU, 2 threads", memory_gib=20.25, calibration=CALIBRATION)
    lines = [*head_lines(plan), *work_lines(plan), *traffic_lines(plan)]
    lines += [
        line for machine in (MACHINE, cpu) for line in memory_lines(replace(plan, cluster=Cluster(2, 4, machine)))
    ]
    for planned in (full, replace(full, steps=None)):
        lines += [line for section in (time_lines, remedy_lines, scaling_lines) for line in section(planned)]
    text = "\n".join(lines)
    assert max(map(len, text.splitlines())) <= COLUMNS, text
    text = " ".join(text.split())
    for whole in ("more cores and data.workers, or", "student's weights, gathered for", "average 1.00 gradients 1.00"):
        assert whole in text, text
