"""What one number of ranks at one stage of ZeRO saved goes on at any other, with the same losses."""

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from cosmos_scale.checkpoint import files
from cosmos_scale.checkpoint.state import KINDS, Manifest, RunState, read_manifest
from cosmos_scale.checkpoint.writer import CheckpointWriter
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.pair import drawn_pair
from cosmos_scale.engine.ranks import Ranks, start_ranks
from cosmos_scale.fragments import Fragment
from cosmos_scale.loss.cosmos_loss import CosmosLoss
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.tiny import Tiny, build_tiny, tiny_batch, tiny_config

BATCH = 12  # which 1, 2, 3 and 4 ranks share evenly
BEFORE, AFTER = 2, 2  # steps
CHUNK = 4096  # bytes: the tiny model's files are smaller than the megabyte under one checksum
# fp32 sums of one batch in another order, over four updates; bf16 has 8 bits and a scale of 14 and more on the logits.
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}


class Case(NamedTuple):
    """How a run computes; any may go on from any other of its precision."""

    stage: int
    precision: str = "fp32"
    offload: bool = False

    def config(self) -> RunConfig:
        """The run's configuration."""
        return tiny_config(
            zero={"stage": self.stage, "offload": self.offload},
            precision=self.precision,
            train={"global_batch": BATCH, "schedule_steps": 100},
            optimizer={"warmup_steps": 0},
        )


class Outcome(NamedTuple):
    """What a rank has after all steps. losses: of the last AFTER. read, most: bytes of the checkpoint's files."""

    losses: list[float]
    fragments: dict[tuple[str, int], dict[str, Tensor]]
    read: int = 0
    most: int = 0


STAGES = (0, 1, 2, 3)
BF16 = Case(2, "bf16")
SAVED = [*map(Case, STAGES), Case(2, offload=True), BF16]


def go_on(tiny: Tiny) -> Outcome:
    losses = [tiny.step(step, batch=tiny_batch(step, BATCH)).total.item() for step in range(BEFORE, BEFORE + AFTER)]
    return Outcome(losses, tiny.fragments())


def folder_of(root: Path, case: Case) -> Path:
    return root / f"{case.stage}-{case.precision}-{case.offload}"


def save_and_go_on(rank: int, world_size: int, root: Path, cases: list[Case]) -> dict[Case, Outcome]:
    """Runs that save in their middle and are left alone."""
    files.CHUNK = CHUNK
    ranks = start_ranks("cpu")
    outcomes = {}
    for case in cases:
        config = case.config()
        tiny = build_tiny(config, ranks, teacher_seed=1)
        for step in range(BEFORE):
            tiny.step(step, batch=tiny_batch(step, BATCH))
        student = tiny.student
        updates, scaler = student.updates, student.layout.loss_scaler()
        state = RunState(BEFORE, BEFORE * BATCH, updates, world_size, scaler, "digest", config.model_dump(mode="json"))
        with CheckpointWriter(folder_of(root, case), student.fragments, ranks.control, config.checkpoint) as writer:
            writer.save(state)
            outcomes[case] = go_on(tiny)  # which must not change what is being written
        tiny.close()
    return outcomes


def load_and_go_on(
    rank: int, world_size: int, root: Path, pairs: list[tuple[Case, Case]]
) -> dict[tuple[Case, Case], Outcome]:
    """Runs that begin where saved ones (the first of each pair) were."""
    files.CHUNK = CHUNK
    ranks = start_ranks("cpu")
    return {(saved, own): resume(folder_of(root, saved) / f"step-{BEFORE:08d}", own, ranks) for saved, own in pairs}


def resume(folder: Path, case: Case, ranks: Ranks) -> Outcome:
    config = case.config()
    other_seed = config.model_copy(update={"seed": 7})  # nothing of what is drawn may be left
    pair = drawn_pair(other_seed, ranks)
    with counted_reads() as sizes:
        pair.restore(folder)
    outcome = go_on(Tiny(pair.student, pair.teacher, CosmosLoss(config.optimizer.gradient_scale)))
    pair.close()
    return outcome._replace(read=sum(sizes), most=most_bytes(folder, read_manifest(folder), pair.student.fragments))


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """Gather the sizes of all reads of a checkpoint's files, headers included."""
    sizes: list[int] = []
    pread = os.pread

    def counting(descriptor: int, size: int, offset: int) -> bytes:
        data = pread(descriptor, size, offset)
        sizes.append(len(data))
        return data

    with patch.object(os, "pread", counting):
        yield sizes


def most_bytes(folder: Path, manifest: Manifest, fragments: list[Fragment]) -> int:
    """The bytes of all chunks that fragments lie in, and of those of the headers of their files, each counted once."""
    chunks: dict[str, set[int]] = {}
    begins = {}
    for name in manifest.files:
        data = (folder / name).read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        begins[name] = {key: header + entry["data_offsets"][0] for key, entry in json.loads(data[8:header]).items()}
        chunks[name] = set(range(-(-header // CHUNK)))
    touched = set()
    for fragment in fragments:
        for name, start, count in manifest.parameters[fragment.name]["pieces"]:
            low = max(fragment.start, start)
            high = min(fragment.start + fragment.weight.numel(), start + count)
            for kind in KINDS if low < high else ():
                first = begins[name][f"{fragment.name}|{kind}"] + 4 * (low - start)
                chunks[name] |= set(range(first // CHUNK, -(-(first + 4 * (high - low)) // CHUNK)))
                touched.add(name)
    sizes = {name: manifest.files[name].size for name in touched}
    return sum(min(CHUNK, size - CHUNK * chunk) for name, size in sizes.items() for chunk in chunks[name])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worlds")


@functools.cache
def uninterrupted(world_size: int, root: Path) -> list[dict[Case, Outcome]]:
    cases = SAVED if world_size == 4 else [Case(2)]
    return run_ranks(save_and_go_on, world_size, root / str(world_size), cases, timeout=200)


@functools.cache
def resumed(saved_by: int, world_size: int, root: Path) -> list[dict[tuple[Case, Case], Outcome]]:
    """By rank. Runs at stage 2 go on at all stages; on two ranks all runs at another stage, on four all unchanged."""
    pairs = [(Case(2), Case(stage)) for stage in STAGES]
    if saved_by == 4 and world_size == 2:
        pairs += [(saved, Case((saved.stage + 2) % 4, saved.precision)) for saved in SAVED if saved != Case(2)]
    if saved_by == 4 and world_size == 4:
        pairs = [(saved, saved) for saved in SAVED]
    uninterrupted(saved_by, root)
    return run_ranks(load_and_go_on, world_size, root / str(saved_by), pairs, timeout=200)


# Saved by; gone on at. Four ranks take over 20 seconds on two cores.
QUICK = [(2, 1), (2, 2)]
WORLDS = QUICK + [pytest.param(4, world_size, marks=pytest.mark.slow) for world_size in (2, 3, 4)]


@pytest.mark.parametrize(("saved_by", "world_size"), WORLDS)
def test_losses_are_those_of_the_run_that_was_left_alone(saved_by: int, world_size: int, root: Path) -> None:
    expected = uninterrupted(saved_by, root)[0]
    assert max(expected[Case(2)].losses) - min(expected[Case(2)].losses) > 0.01
    for outcomes in resumed(saved_by, world_size, root):
        for (saved, own), outcome in outcomes.items():
            assert outcome.losses == pytest.approx(expected[saved].losses, abs=TOLERANCES[saved.precision]), (
                saved,
                own,
            )


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_nothing_changed_is_bit_for_bit(world_size: int, root: Path) -> None:
    found = zip(resumed(world_size, world_size, root), uninterrupted(world_size, root), strict=True)
    for outcomes, expected in found:
        for case, alone in expected.items():
            outcome = outcomes[case, case]
            assert outcome.losses == alone.losses, case
            assert outcome.fragments.keys() == alone.fragments.keys()
            for key, tensors in alone.fragments.items():
                for kind, tensor in tensors.items():
                    assert torch.equal(outcome.fragments[key][kind], tensor), (case, key, kind)


@pytest.mark.parametrize(("saved_by", "world_size"), WORLDS)
def test_a_rank_reads_the_chunks_of_its_share_and_each_once(saved_by: int, world_size: int, root: Path) -> None:
    for outcomes in resumed(saved_by, world_size, root):
        for pair, outcome in outcomes.items():
            assert 0 < outcome.read <= outcome.most, pair


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_rank_of_an_unchanged_run_reads_its_own_file_and_no_other(world_size: int, root: Path) -> None:
    folder = folder_of(root / str(world_size), Case(2)) / f"step-{BEFORE:08d}"
    for rank, outcomes in enumerate(resumed(world_size, world_size, root)):
        own = folder / f"fragments-{rank:05d}.safetensors"
        assert outcomes[Case(2), Case(2)].read == own.stat().st_size
