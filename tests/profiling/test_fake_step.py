"""A step that is counted without other ranks and without the work asks for what the real step asks for."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

from cosmos_scale.config import RunConfig
from cosmos_scale.engine.memory import state_memory, total_bytes
from cosmos_scale.engine.pair import drawn_pair
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.loss import CosmosLoss
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.profiling.collectives import CollectiveCounter
from cosmos_scale.profiling.counts import PHASES, Counts, Exchange, counts_of_json
from cosmos_scale.profiling.fake_ranks import start_fake_ranks
from cosmos_scale.profiling.fake_step import count_fake_step, exchanges_of
from cosmos_scale.profiling.phased_step import step_in_phases
from cosmos_scale.profiling.planned_batch import planned_lengths
from cosmos_scale.step import train_step
from cosmos_scale.testing.allocation import peak_bytes
from cosmos_scale.testing.batches import random_batch, with_levels
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


def real_exchanges(rank: int, world_size: int) -> list[tuple[Exchange, ...]]:
    """Return the collectives of the fourth step at each stage."""
    ranks, found = start_ranks("cpu"), []
    for stage in STAGES:
        config = config_of(world_size, precision="bf16", zero={"stage": stage})
        lengths = [(4, config.model.text.context_length)] * config.data.captions.count
        batch = with_levels(random_batch(config.model, config.data.views, SAMPLES, lengths))
        pair, loss = drawn_pair(config, ranks), CosmosLoss(config.optimizer.gradient_scale)
        for _ in range(3):
            train_step(*pair, loss, batch, lr=1e-4, momentum=0.99)
        counter = CollectiveCounter()
        with counter:
            step_in_phases(*pair, loss, batch, counter.enter_phase)
            _ = pair.teacher.model  # waits for the refresh
        pair.close()
        found.append(exchanges_of(counter.seen))
    return found


def fake_counts(rank: int, _: int, world_size: int) -> list[Counts]:
    """Return the counts of each stage, as a CPU runs it."""
    ranks, found = start_fake_ranks(world_size), []
    for stage in STAGES:
        config = config_of(world_size, precision="bf16", zero={"stage": stage})
        found.append(count_fake_step(config, ranks, planned_lengths(config, SAMPLES), as_gpu=False))
    return found


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 4])
def counted(request: pytest.FixtureRequest) -> list[Counts]:
    """The counts of each stage, of one of 2 ranks or of 4."""
    found: list[Counts] = run_ranks(fake_counts, 1, request.param, timeout=SECONDS)[0]
    return found


def test_collectives_are_those_of_real_ranks(counted: Sequence[Counts]) -> None:
    """Phase, kind, dtype, bytes and calls, all of them equal, at every stage."""
    real, *_ = run_ranks(real_exchanges, counted[0].world_size, timeout=SECONDS)
    for stage, exchanges, counts in zip(STAGES, real, counted, strict=True):
        assert Counter(counts.exchanges) == Counter(exchanges), stage
        assert exchanges, stage


def test_states_are_those_of_the_formula(counted: Sequence[Counts]) -> None:
    """Within 2 % between backward and update, at each stage."""
    for counts in counted:
        config = config_of(counts.world_size, precision="bf16", zero={"stage": counts.stage})
        with torch.device("meta"):
            expected = total_bytes(state_memory(CosmosModel(config.model), config, counts.world_size))
        left = counts.memory_of("backward").left
        states = sum(nbytes for owner, nbytes in left.items() if owner not in NOT_STATES)
        assert states == pytest.approx(expected, rel=STATES_TOLERANCE), counts.stage


def real_and_counted_peaks(rank: int, world_size: int) -> dict[str, tuple[int, int]]:
    """Return what a step needs beside what is held before it: by torch's allocator, and counted."""
    found, ranks = {}, start_ranks("cpu")
    for name, load in LOADS.items():
        config = config_of(4, train={"global_batch": 8, "schedule_steps": 100, **load}, zero={"stage": 0})
        lengths = [(4, config.model.text.context_length)] * config.data.captions.count
        batch = with_levels(random_batch(config.model, config.data.views, 8, lengths))
        pair, loss = drawn_pair(config, ranks), CosmosLoss(config.optimizer.gradient_scale)
        step = partial(train_step, *pair, loss, batch, lr=1e-4, momentum=0.99)
        for _ in range(2):
            step()
        real = peak_bytes(step)
        pair.close()
        counts = count_fake_step(config, ranks, batch.caption_lengths, as_gpu=False)
        found[name] = real, counts.peak.peak - sum(counts.memory[-1].left.values())
    return found


def test_peaks_are_those_of_the_allocator() -> None:
    """Within 3 % where all activations are kept, where blocks are computed again, and with micro-batches."""
    (found,) = run_ranks(real_and_counted_peaks, 1, timeout=SECONDS)
    for name, (real, counted) in found.items():
        assert counted == pytest.approx(real, rel=PEAK_TOLERANCE), name
    assert found["recompute 1"][0] < found["all kept"][0]


def test_counts_go_through_json(counted: Sequence[Counts]) -> None:
    for counts in counted:
        assert counts_of_json(counts.to_json()) == counts
        assert [memory.phase for memory in counts.memory] == list(PHASES)


def gpu_counts(rank: int, _: int) -> Counts:
    """Return the counts of one of 8 ranks on GPUs at stage 1."""
    config = config_of(8, precision="bf16", zero={"stage": 1})
    return count_fake_step(config, start_fake_ranks(8), planned_lengths(config, SAMPLES), as_gpu=True)


def test_a_gpu_runs_its_own_kernels() -> None:
    """Attention over packed segments, counted by its pairs of tokens, and the project's kernels."""
    (counts,) = run_ranks(gpu_counts, 1, timeout=SECONDS)
    names = {found.name for found in counts.operators}
    assert {"_varlen_attn", "_varlen_attn_backward", "adamw_ema_update", "contrastive_statistics"} <= names
    config, causal = config_of(8), [found for found in counts.operators if found.shape[-1:] == (1,)]
    teacher = [found for found in causal if found.phase == "teacher" and found.name == "_varlen_attn"]
    lengths = planned_lengths(config, SAMPLES)[: config.data.captions.global_count]
    pairs, filling = int((lengths * (lengths + 1) // 2).sum()), -int(lengths.sum()) % 256
    whole, rest = divmod(filling, config.model.text.context_length)
    pairs += whole * config.model.text.context_length * (config.model.text.context_length + 1) // 2
    pairs += rest * (rest + 1) // 2  # tokens that fill up are segments too
    assert sum(found.flops for found in teacher) == 4 * pairs * config.model.text.width * config.model.text.layers
