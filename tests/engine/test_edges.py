"""What is rare and must not go wrong: odd world sizes, values that are not finite anywhere, evaluation at stage 3."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from cosmos_scale.batch import Batch
from cosmos_scale.config import RunConfig
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.runs import records, train_to_end, write_run
from cosmos_scale.testing.tiny import Tiny, build_tiny, tiny_batch, tiny_config

# fp32 sums of one batch in another order, over three updates.
TOLERANCE = 1e-5
SAMPLES = 6  # for three ranks of two


class Case(NamedTuple):
    """What one run sets."""

    stage: int
    offload: bool = False
    micro_batches: int = 1

    def config(self) -> RunConfig:
        """The run's configuration."""
        return tiny_config(
            zero={"stage": self.stage, "offload": self.offload},
            train={"global_batch": SAMPLES, "schedule_steps": 100, "micro_batches": self.micro_batches},
            optimizer={"warmup_steps": 0},
        )


ALONE = Case(0, micro_batches=2)
CASES = [ALONE, *(Case(stage, micro_batches=2) for stage in (1, 2, 3))]
CASES += [Case(stage, offload=True) for stage in (2, 3)]
CASES += [Case(stage, offload=True, micro_batches=2) for stage in (2, 3)]


def batch_of(step: int) -> Batch:
    """The first samples of a step's batch."""
    batch = tiny_batch(step)
    crops, local, captions, lengths = (tensor[:, :SAMPLES] for tensor in batch[:4])
    return Batch(crops, local, captions, lengths, batch.sample_ids[:SAMPLES], batch.substituted)


def run_cases(rank: int, world_size: int, cases: list[Case]) -> dict[Case, dict[str, Any]]:
    """Three steps of every case, then one with a bad value and one with a bad gradient, on one rank each."""
    ranks = start_ranks("cpu")
    results: dict[Case, dict[str, Any]] = {}
    for case in cases:
        tiny = build_tiny(case.config(), ranks, teacher_seed=1)
        losses = [tiny.step(step, batch=batch_of(step)).total.item() for step in range(3)]
        changed, finite = [], []
        before = tiny.fragments()
        for bad_step in (_step_with_bad_value, _step_with_bad_gradient):
            finite.append(bad_step(tiny, rank, world_size))
            for key, tensors in tiny.fragments().items():
                changed += [
                    (key, kind) for kind, tensor in tensors.items() if not torch.equal(tensor, before[key][kind])
                ]
        last = tiny.step(5, batch=batch_of(5))
        results[case] = {
            "losses": losses,
            "finite": [*finite, bool(last.finite)],
            "changed": changed,
            "updates": tiny.student.updates,
        }
        tiny.close()
    return results


def _step_with_bad_value(tiny: Tiny, rank: int, world_size: int) -> bool:
    """In the last sample of the last rank: with two micro-batches, in the second."""
    batch = batch_of(3)
    crops = batch.local_crops.clone()
    crops[0, -1] = torch.inf
    return bool(tiny.step(3, batch=batch._replace(local_crops=crops)).finite)


def _step_with_bad_gradient(tiny: Tiny, rank: int, world_size: int) -> bool:
    """In the last backward of the last rank, where the loss is finite."""
    backwards = 0

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal backwards
        backwards += 1
        return gradient + torch.inf if rank == world_size - 1 and backwards == tiny.student.micro_batches else gradient

    hook = tiny.student.model.visual.proj.register_hook(spoil)
    output = tiny.step(4, batch=batch_of(4))
    hook.remove()
    assert backwards == tiny.student.micro_batches
    assert bool(output.total.isfinite())
    return bool(output.finite)


@functools.cache
def results_of(world_size: int) -> list[dict[Case, dict[str, Any]]]:
    return run_ranks(run_cases, world_size, CASES if world_size > 1 else [ALONE], timeout=240)


# No size of a tensor, of a group or of the whole is a multiple of three, and the scales' [1] leave two ranks padding.
@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_ranks_train_as_one(case: Case) -> None:
    alone = results_of(1)[0][ALONE]["losses"]
    assert max(alone) - min(alone) > 0.01
    for result in results_of(3):
        assert result[case]["losses"] == pytest.approx(alone, abs=TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_not_finite_in_one_micro_batch_of_one_rank_changes_nothing(case: Case) -> None:
    for result in results_of(3):
        assert result[case]["finite"] == [False, False, True]
        assert result[case]["changed"] == []
        assert result[case]["updates"] == 4


def test_evaluation_at_stage_3_is_that_of_stage_0(tmp_path: Path, scenes: SceneShards) -> None:
    """The second rank has fewer pairs, and fewer batches of them, so that the ranks' forwards do not go in step."""
    retrieval = {"shards": str(scenes.gallery), "max_samples": 23, "batch": 11}
    run = write_run(tmp_path, scenes, eval={"every": 1, "retrieval": retrieval}, optimizer={"lr": 0.01})
    evaluations = []
    for stage in (0, 3):
        train_to_end(run, f"name=stage{stage}", f"zero.stage={stage}", "train.max_steps=2", ranks=2).require(0)
        evaluations.append(records(run, f"stage{stage}", kind="eval"))
    assert [record["step"] for record in evaluations[0]] == [1, 2]
    for whole, sharded in zip(*evaluations, strict=True):
        assert whole["student/images"] == 23
        results = [
            {key: record[key] for key in record if key.startswith(("student/", "teacher/"))}
            for record in (whole, sharded)
        ]
        assert results[0] == results[1]
