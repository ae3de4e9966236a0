"""All stages of ZeRO, offloading, micro-batches and recomputed blocks train alike, on any number of ranks."""

import functools
from typing import Any, NamedTuple

import pytest
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from cosmos_scale.config import RunConfig
from cosmos_scale.engine.optimizer import SCALE_RANGE
from cosmos_scale.engine.ranks import Ranks, start_ranks
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.tiny import Tiny, build_tiny, tiny_config

STEPS = 4
LR = 1e-3
MOMENTUM = 0.9
# fp32 sums of one batch in another order, over four updates; bf16 has 8 bits and a scale of 14 and more on the logits.
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}
# Four fp32 interpolations of values around 1, against the same done on whole weights.
AVERAGE_TOLERANCE = 1e-6


class Case(NamedTuple):
    """What one run sets."""

    stage: int
    precision: str = "fp32"
    offload: bool = False
    micro_batches: int = 1
    recompute: int = 0
    clip_norm: float | None = None

    def config(self) -> RunConfig:
        """The run's configuration."""
        train = {"global_batch": 8, "schedule_steps": 100}
        return tiny_config(
            zero={"stage": self.stage, "offload": self.offload},
            precision=self.precision,
            train=train | {"micro_batches": self.micro_batches, "recompute": self.recompute},
            optimizer={"warmup_steps": 0, "clip_norm": self.clip_norm},
        )


STAGES = (0, 1, 2, 3)
PLAIN = [Case(stage, precision) for precision in ("fp32", "bf16") for stage in STAGES]
CLIPPED = Case(0, clip_norm=1.0)
OFFLOADED = [Case(stage, offload=True) for stage in (1, 2, 3)]
# The norm of the gradients is that before clipping. tests/engine/test_edges.py has micro-batches without clipping.
ACCUMULATED = [Case(stage, micro_batches=2, clip_norm=1.0) for stage in STAGES]
ACCUMULATED += [Case(2, micro_batches=2, offload=True, clip_norm=1.0)]
RECOMPUTED = [Case(0, recompute=1), Case(0, recompute=2), Case(2, recompute=1), Case(3, recompute=2)]
RECOMPUTED += [Case(3, recompute=1, micro_batches=2, clip_norm=1.0)]
CASES = [*PLAIN, CLIPPED, *OFFLOADED, *ACCUMULATED, *RECOMPUTED]
# Four ranks take over 20 seconds on two cores. What is not here, tests/engine/test_ranks.py has on four ranks, or two
# ranks show it here.
FOUR_RANKS = [*OFFLOADED, *ACCUMULATED[:3], RECOMPUTED[-1]]


def run_cases(rank: int, world_size: int, cases: list[Case]) -> dict[Case, dict[str, Any]]:
    """A few steps of every case."""
    ranks = start_ranks("cpu")
    linear = functional.linear
    results = {case: run_case(case, ranks) for case in cases}
    assert functional.linear is linear, "DeepSpeed replaced it for the whole process"
    return results


def run_case(case: Case, ranks: Ranks) -> dict[str, Any]:
    """Losses, the worst distance of the teacher from an unsharded average, and what the scales did at their bound."""
    tiny = build_tiny(case.config(), ranks, teacher_seed=1)
    with tiny.teacher.whole_model() as model:
        average = {name: weight.double() for name, weight in model.named_parameters()}
    losses = []
    for step in range(STEPS):
        with tiny.student.whole_model() as model:
            for name, weight in model.named_parameters():
                average[name] = MOMENTUM * average[name] + (1 - MOMENTUM) * weight.detach().double()
        output = tiny.step(step, lr=LR, momentum=MOMENTUM)
        losses.append(output.total.item())
    with tiny.teacher.whole_model() as model:
        distances = [(weight.double() - average[name]).abs().max().item() for name, weight in model.named_parameters()]
    result = {"losses": losses, "distance": max(distances), "norm": output.gradient_norm.item()}
    if case.micro_batches == 1 and not case.recompute:
        result["scales"] = scales_at_their_bound(tiny)
    tiny.close()
    return result


def scales_at_their_bound(tiny: Tiny) -> list[float]:
    """What the forward reads of both scales after a step that pushes beyond the bound, and the same as parameters."""
    scales = [fragment for fragment in tiny.student.fragments if fragment.name.endswith("logit_scale")]
    for fragment in scales:  # a moment so large that the next update goes up, whatever the gradient
        fragment.weight.fill_(SCALE_RANGE[1])
        fragment.exp_avg.fill_(-1000.0)
    tiny.student.publish()
    for step in range(2):
        output = tiny.step(step, lr=0.05)
    with tiny.student.whole_model() as model:
        read = [model.logit_scale.item(), model.distill_logit_scale.item()]
    return [output.logit_scale.item(), output.distill_logit_scale.item(), *read]


@functools.cache
def results_of(world_size: int) -> list[dict[Case, dict[str, Any]]]:
    return run_ranks(run_cases, world_size, FOUR_RANKS if world_size == 4 else CASES, timeout=400)


def worlds_of(cases: list[Case]) -> pytest.MarkDecorator:
    """Parametrize a test by the world sizes and cases that are run."""
    four = [pytest.param(4, case, marks=pytest.mark.slow) for case in cases if case in FOUR_RANKS]
    pairs = [(world_size, case) for world_size in (1, 2) for case in cases]
    return pytest.mark.parametrize(("world_size", "case"), [*pairs, *four], ids=str)


FULL_PRECISION = [case for case in CASES if case.precision == "fp32"]


@worlds_of(CASES)
def test_losses_are_those_of_one_process_at_stage_0(world_size: int, case: Case) -> None:
    alone = results_of(1)[0][Case(0, clip_norm=case.clip_norm)]["losses"]
    assert max(alone) - min(alone) > 0.05
    for result in results_of(world_size):
        assert result[case]["losses"] == pytest.approx(alone, abs=TOLERANCES[case.precision])


@worlds_of(FULL_PRECISION)
def test_gradients_are_as_long_as_those_of_one_process(world_size: int, case: Case) -> None:
    """Before clipping: losses do not tell, as neither AdamW nor clipped gradients know of a common factor."""
    alone = results_of(1)[0][Case(0, clip_norm=case.clip_norm)]["norm"]
    for result in results_of(world_size):
        assert result[case]["norm"] == pytest.approx(alone, rel=TOLERANCES["fp32"])


@worlds_of(FULL_PRECISION)
def test_teacher_is_the_unsharded_average(world_size: int, case: Case) -> None:
    for result in results_of(world_size):
        assert result[case]["distance"] <= AVERAGE_TOLERANCE


@worlds_of([*PLAIN, *OFFLOADED])
def test_scales_stay_clamped_where_the_forward_reads_them(world_size: int, case: Case) -> None:
    for result in results_of(world_size):
        *read_by_loss, logit, distill = result[case]["scales"]
        assert read_by_loss == pytest.approx([SCALE_RANGE[1]] * 2, abs=1e-6)
        # The parameters themselves are in compute precision.
        assert [logit, distill] == pytest.approx([SCALE_RANGE[1]] * 2, abs=1e-6 if case.precision == "fp32" else 2e-2)


def test_clipping_took_place() -> None:
    plain, clipped = (results_of(1)[0][case]["losses"] for case in (Case(0), CLIPPED))
    assert plain[1] != pytest.approx(clipped[1], abs=TOLERANCES["fp32"])


def communication(rank: int, world_size: int) -> dict[Case, tuple[list[str], list[str], int]]:
    """The collectives inside the optimizer's step, those of the teacher's refresh, and the groups, of every case."""
    ranks = start_ranks("cpu")
    found = {}
    for case in [*PLAIN[:4], *OFFLOADED]:
        tiny = build_tiny(case.config(), ranks)
        tiny.step(0)
        with profile(activities=[ProfilerActivity.CPU]) as whole_step:
            tiny.step(1)
            _ = tiny.teacher.model  # waits: threads that are recorded must not outlive the recording
        updates = [event for event in whole_step.events() if event.name.startswith("Optimizer.step#AdamWEma")]
        assert updates
        collectives = [event for event in whole_step.events() if event.name.startswith(("gloo:", "c10d::"))]
        assert collectives
        inside = [
            event.name
            for event in collectives
            if any(
                update.time_range.start <= event.time_range.start <= update.time_range.end
                and _same_thread(event, update)
                for update in updates
            )
        ]
        with profile(activities=[ProfilerActivity.CPU]) as refresh:
            tiny.teacher.refresh()
            _ = tiny.teacher.model
        refreshing = [event.name for event in refresh.events() if event.name.startswith("c10d::")]
        found[case] = (inside, refreshing, len(tiny.student.layout.masters))
        tiny.close()
    return found


def _same_thread(event: Any, update: Any) -> bool:
    # gloo works in threads of its own; what they do began with a call from the thread that updates.
    return bool(event.thread == update.thread)


def test_the_average_needs_no_collective_and_the_refresh_one_a_group() -> None:
    for found in run_ranks(communication, 2, timeout=200):
        for case, (update, refresh, groups) in found.items():
            assert update == [], case
            assert len(refresh) == (groups if case.stage in (1, 2) else 0), case
