"""What norms read: float32 gains and offsets of masters and averages at every stage, and what bringing them costs."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cosmos_scale.checkpoint.state import RunState
from cosmos_scale.checkpoint.writer import CheckpointWriter
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.pair import Pair, drawn_pair
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.model.cosmos import LOG_SCALES, CosmosModel
from cosmos_scale.model.transformer import LayerNorm
from cosmos_scale.profiling.collectives import Collective, CollectiveCounter
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.tiny import GLOBAL_BATCH, Tiny, build_tiny, tiny_config, whole
from cosmos_scale.testing.traffic import count_traffic

SMALL_LR = 1e-5  # an update of a gain of 1 is far below the 2^-8 that bfloat16 can tell from 1
STEPS = 3
GAIN = 1.003  # bfloat16 rounds it to 1


class Case(NamedTuple):
    """How a run computes."""

    stage: int
    precision: str = "bf16"
    offload: bool = False
    recompute: int = 0
    micro_batches: int = 1

    def config(self, **changes: Any) -> RunConfig:
        """The run's configuration."""
        train = {"global_batch": GLOBAL_BATCH, "schedule_steps": 100}
        train |= {"recompute": self.recompute, "micro_batches": self.micro_batches}
        zero = {"stage": self.stage, "offload": self.offload}
        return tiny_config(zero=zero, precision=self.precision, train=train, **changes)


CASES = [
    *map(Case, (0, 1, 2, 3)),
    Case(1, offload=True),
    Case(1, recompute=1, micro_batches=2),
    Case(3, recompute=1, micro_batches=2),
]


class Seen(NamedTuple):
    """A rank's state, and what each norm of student and teacher makes of `rows_of`; the same after a resume."""

    fragments: dict[tuple[str, int], dict[str, Tensor]]
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    aligned: bool  # whether kernels find all values at multiples of 16 bytes
    student_resumed: dict[str, Tensor]
    teacher_resumed: dict[str, Tensor]
    losses: tuple[float, float]  # of the next step, and of the same after the resume
    refresh: list[Collective]  # of `FullValues`


def rows_of(norm: LayerNorm) -> Tensor:
    """Rows for a norm: [64, D] bfloat16."""
    (width,) = norm.normalized_shape
    return torch.randn(64, width, generator=torch.Generator().manual_seed(width)).bfloat16()


def outputs(model: CosmosModel) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: norm(rows_of(norm)) for name, norm in model.norms().items()}


def of_pair(tiny: Tiny) -> list[dict[str, Tensor]]:
    found = []
    for side in (tiny.student, tiny.teacher):
        with side.whole_model() as model:
            found.append(outputs(model))
    return found


def run_cases(rank: int, world_size: int, root: Path) -> dict[Case, Seen]:
    """Some small steps of every case from gains that bfloat16 does not hold."""
    ranks = start_ranks("cpu")
    results = {}
    for case in CASES:
        config = case.config(optimizer={"warmup_steps": 0})
        tiny = build_tiny(config, ranks, teacher_seed=1)
        for fragment in tiny.student.fragments:
            if "ln_" in fragment.name and fragment.name.endswith("weight"):
                fragment.weight.fill_(GAIN)
                fragment.ema.fill_(GAIN)
        tiny.student.publish()
        tiny.teacher.refresh()
        for step in range(STEPS):
            tiny.step(step, lr=SMALL_LR)
        student, teacher = of_pair(tiny)
        fragments = tiny.fragments()
        with CollectiveCounter() as collectives:
            tiny.student.full_values.refresh()
        models = (tiny.student.model, tiny.teacher.model)
        values = [value for model in models for norm in model.norms().values() for value in norm.values or ()]
        aligned = all(value.data_ptr() % 16 == 0 for value in values)
        folder = root / f"{case}"
        state = RunState(STEPS, STEPS, STEPS, world_size, {}, "digest", config.model_dump(mode="json"))
        with CheckpointWriter(folder, tiny.student.fragments, ranks.control, config.checkpoint) as writer:
            writer.save(state)
        next_loss = tiny.step(STEPS, lr=SMALL_LR).total.item()
        loss = tiny.loss
        tiny.close()
        again = Tiny(*drawn_pair(config.model_copy(update={"seed": 7}), ranks), loss)
        Pair(again.student, again.teacher).restore(folder / f"step-{STEPS:08d}")
        student_again, teacher_again = of_pair(again)
        losses = next_loss, again.step(STEPS, lr=SMALL_LR).total.item()
        results[case] = Seen(
            fragments, student, teacher, aligned, student_again, teacher_again, losses, collectives.seen
        )
        again.close()
    return results


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("full_values")


@functools.cache
def results_of(world_size: int, root: Path) -> list[dict[Case, Seen]]:
    return run_ranks(run_cases, world_size, root / str(world_size), timeout=200)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_norms_follow_masters_and_averages(world_size: int, case: Case, root: Path) -> None:
    results = [result[case] for result in results_of(world_size, root)]
    norms = CosmosModel(case.config().model).norms()
    for kind, side in (("weight", "student"), ("ema", "teacher")):
        values = whole([result.fragments for result in results], kind)
        moved = rounded_differ = 0
        for name, norm in norms.items():
            gain, offset, rows = values[f"{name}.weight"], values[f"{name}.bias"], rows_of(norm)
            moved += int((gain != GAIN).any())
            expected = functional.layer_norm(rows, gain.shape, gain, offset, norm.eps)
            rounded = functional.layer_norm(rows, gain.shape, gain.bfloat16(), offset.bfloat16(), norm.eps)
            rounded_differ += int(not torch.equal(expected, rounded))
            for result in results:
                assert result.aligned
                assert torch.equal(getattr(result, side)[name], expected), (side, name)
        # The masters moved, all of them by less than bfloat16 shows.
        assert moved == rounded_differ == len(norms) == 15


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_reads_the_same_bits(world_size: int, case: Case, root: Path) -> None:
    for result in (result[case] for result in results_of(world_size, root)):
        for before, after in ((result.student, result.student_resumed), (result.teacher, result.teacher_resumed)):
            assert all(torch.equal(before[name], after[name]) for name in before)
        assert result.losses[0] == result.losses[1]


def test_full_precision_needs_no_values_of_its_own() -> None:
    tiny = build_tiny(Case(1, "fp32").config(), start_ranks("cpu"))
    assert set(tiny.student.full_values.masters) == set(LOG_SCALES)
    assert not tiny.student.full_values.averages
    with tiny.student.whole_model() as model:
        assert all(norm.values is None for norm in model.norms().values())
    tiny.close()


@pytest.mark.parametrize("stage", [0, 1])
def test_one_process_reads_masters_and_averages_themselves(stage: int) -> None:
    tiny = build_tiny(Case(stage).config(), start_ranks("cpu"))
    values, states = tiny.student.full_values, {fragment.name: fragment for fragment in tiny.student.fragments}
    for name, norm in tiny.student.model.norms().items():
        assert norm.values is not None
        assert norm.values[0].data_ptr() == states[f"{name}.weight"].weight.data_ptr()
        assert values.averages[f"{name}.bias"].data_ptr() == states[f"{name}.bias"].ema.data_ptr()
    tiny.close()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_small_gather_brings_all_values(world_size: int, case: Case, root: Path) -> None:
    """Where ranks hold parts: as large as the values, and what equal shares of ranks add to them."""
    norms = CosmosModel(case.config().model).norms().values()
    values = 2 * sum(2 * norm.normalized_shape[0] for norm in norms) + len(LOG_SCALES)
    for result in (result[case] for result in results_of(world_size, root)):
        if world_size == 1 or case.stage == 0:
            assert result.refresh == []
            continue
        ((_, kind, dtype, elements),) = result.refresh
        assert (kind, dtype) == ("all_gather", torch.float32)
        assert values <= elements <= 1.2 * values


@pytest.mark.parametrize("stage", [1, 3])
def test_norms_travel_with_the_scales(stage: int) -> None:
    """A step has the collectives that it has in fp32, where the scales alone are gathered."""
    train = {"global_batch": 8, "schedule_steps": 100}
    found = []
    for precision in ("bf16", "fp32"):
        config = tiny_config(zero={"stage": stage}, precision=precision, train=train)
        ((seen, _),) = run_ranks(count_traffic, 1, config, 8)
        found.append([(collective.phase, collective.kind) for collective in seen])
    assert found[0] == found[1]
