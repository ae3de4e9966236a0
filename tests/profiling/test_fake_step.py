"""A step that is counted without other ranks and without the work asks for what the real step asks for."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cosmos_scale.config import RunConfig
from cosmos_scale.engine.memory import between_steps, gradients_in_flight, state_memory, total_bytes
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.profiling.counts import PHASES, Counts, counts_of_json
from cosmos_scale.profiling.memory_timeline import BEFORE
from cosmos_scale.profiling.planned_batch import planned_lengths
from cosmos_scale.testing.counted_steps import fake_counts, real_and_counted_peaks, real_exchanges
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.tiny import tiny_config

SAMPLES, STAGES = 2, (0, 1, 2, 3)
STATES_TOLERANCE, PEAK_TOLERANCE = 0.02, 0.03
NOT_STATES = ("batch", "activations", "scratch")
SECONDS = 300.0
LOADS: dict[str, dict[str, int]] = {
    "all kept": {},
    "recompute 2": {"recompute": 2},
    "recompute 1": {"recompute": 1},
    "4 micro-batches": {"micro_batches": 4},
}


def config_of(world_size: int, **changes: Any) -> RunConfig:
    """Return a tiny run whose global batch is SAMPLES for each rank."""
    train = {"global_batch": world_size * SAMPLES, "schedule_steps": 100}
    return tiny_config(**{"train": train, "optimizer": {"warmup_steps": 0}} | changes)


def configs_of(world_size: int) -> list[RunConfig]:
    """Return a run for each stage."""
    return [config_of(world_size, precision="bf16", zero={"stage": stage}) for stage in STAGES]


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 4])
def counted(request: pytest.FixtureRequest) -> list[Counts]:
    """The counts of each stage as a CPU runs it, of one of 2 ranks or of 4."""
    ranks: int = request.param
    found: list[Counts] = run_ranks(fake_counts, 1, configs_of(ranks), ranks, SAMPLES, timeout=SECONDS)[0]
    return found


def test_collectives_are_those_of_real_ranks(counted: Sequence[Counts]) -> None:
    """Phase, kind, dtype, bytes and calls, all of them equal, at every stage."""
    world_size = counted[0].world_size
    real, *_ = run_ranks(real_exchanges, world_size, configs_of(world_size), SAMPLES, timeout=SECONDS)
    for stage, exchanges, counts in zip(STAGES, real, counted, strict=True):
        assert Counter(counts.exchanges) == Counter(exchanges), stage
        assert exchanges, stage


def test_the_peak_by_phases_adds_up_to_the_peak(counted: Sequence[Counts]) -> None:
    for counts in counted:
        for memory in counts.memory:
            assert sum(memory.taken.values()) == memory.peak == sum(memory.parts.values())
        states = {owner for owner in counts.memory_of("student").parts if owner not in NOT_STATES}
        found = counts.memory_of("student").taken
        assert found[BEFORE] <= sum(counts.memory_of("student").parts[owner] for owner in states)
        assert found["student"] >= counts.memory_of("student").parts["activations"]
        assert counts.memory_of("backward").taken["backward"] > 0


def test_states_are_those_of_the_formula(counted: Sequence[Counts]) -> None:
    """Within 2 % between backward and update, and between two steps, at each stage."""
    for counts in counted:
        config = config_of(counts.world_size, precision="bf16", zero={"stage": counts.stage})
        with torch.device("meta"):
            rows = state_memory(CosmosModel(config.model), config, counts.world_size)
        for phase, held in (("backward", rows), ("refresh", between_steps(rows, config))):
            left = counts.memory_of(phase).left
            states = sum(nbytes for owner, nbytes in left.items() if owner not in NOT_STATES)
            assert states == pytest.approx(total_bytes(held), rel=STATES_TOLERANCE), (counts.stage, phase)


def test_gradients_in_flight_are_those_of_the_formula(counted: Sequence[Counts]) -> None:
    """At most as many bytes as the formula says, and no less than 3/4 of them, at stages 1 and 2."""
    for counts in counted[1:3]:
        config = config_of(counts.world_size, precision="bf16", zero={"stage": counts.stage})
        with torch.device("meta"):
            model = CosmosModel(config.model)
        rows = state_memory(model, config, counts.world_size)
        most = sum(row.nbytes for row in rows if row.part == "gradients")
        most += gradients_in_flight(model, config, counts.world_size)
        held = counts.memory_of("backward").most["gradients"]
        assert 0.75 * most <= held <= 1.05 * most, (counts.stage, held, most)


def test_counts_go_through_json(counted: Sequence[Counts]) -> None:
    for counts in counted:
        assert counts_of_json(counts.to_json()) == counts
        assert [memory.phase for memory in counts.memory] == list(PHASES)


def test_peaks_are_those_of_the_allocator() -> None:
    """Within 3 % where all activations are kept, where blocks are computed again, and with micro-batches."""
    loads = [config_of(1, train={"global_batch": 8, "schedule_steps": 100, **load}) for load in LOADS.values()]
    (found,) = run_ranks(real_and_counted_peaks, 1, loads, timeout=SECONDS)
    peaks = dict(zip(LOADS, found, strict=True))
    for name, (real, counted) in peaks.items():
        assert counted == pytest.approx(real, rel=PEAK_TOLERANCE), name
    assert peaks["recompute 1"][0] < peaks["all kept"][0]


def test_a_gpu_runs_its_own_kernels() -> None:
    """Attention over packed segments, counted by its pairs of tokens, and the project's kernels; nothing is left over.

    What a step leaves would be a leak: the next step begins with states and the batch alone.
    """
    config = config_of(8, precision="bf16", zero={"stage": 1})
    ((counts,),) = run_ranks(fake_counts, 1, [config], 8, SAMPLES, True, timeout=SECONDS)
    names = {found.name for found in counts.operators}
    assert {"_varlen_attn", "_varlen_attn_backward", "adamw_ema_update", "contrastive_statistics"} <= names
    causal = [found for found in counts.operators if found.shape[-1:] == (1,)]
    teacher = [found for found in causal if found.phase == "teacher" and found.name == "_varlen_attn"]
    text, lengths = config.model.text, planned_lengths(config, SAMPLES)[: config.data.captions.global_count]
    whole, rest = divmod(-int(lengths.sum()) % 256, text.context_length)  # tokens that fill up are segments too
    segments = [*lengths.flatten().tolist(), *[text.context_length] * whole, rest]
    pairs = sum(length * (length + 1) // 2 for length in segments)
    assert sum(found.flops for found in teacher) == 4 * pairs * text.width * text.layers
    with torch.device("meta"):
        expected = total_bytes(state_memory(CosmosModel(config.model), config, 8))
    left = counts.memory_of("backward").left
    states = sum(nbytes for owner, nbytes in left.items() if owner not in NOT_STATES)
    assert states - expected < 200_000  # tables, and 512 bytes for each small tensor
