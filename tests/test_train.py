"""Whole runs: killed and resumed, stopped, evaluated, on one rank and on two, beside their uninterrupted selves."""

import json
import shutil
import signal
from pathlib import Path
from typing import Literal

import pytest
import torch

from cosmos_scale.checkpoint import newest
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.testing.runs import (
    Launched,
    checkpoint_tensors,
    last_checkpoint,
    launch,
    records,
    start,
    train_to_end,
    wait_for_step,
    write_run,
)
from cosmos_scale.testing.shard_files import sample, write_shard, write_shards
from tests.evaluation.measured import retrieval_of

MODELS: tuple[Literal["student", "teacher"], ...] = ("student", "teacher")
# All that a step computes, compared exactly: a resumed run does the same operations in the same order.
COMPUTED = ("step", "samples", "loss", "clip", "distill", "scale", "distill_scale", "lr", "momentum", "grad_norm")
# A run that is killed or signalled has so many steps that it cannot end before, however busy the machine is. The
# learning rate changes at each step all the same.
ENDLESS = {"schedule_steps": 10_000}
# Ten steps an epoch: a killed run goes on from the middle of an epoch.
INTERRUPTED = {"train": ENDLESS, "checkpoint": {"every": 3}}


def computed(run: Path, name: str = "tiny") -> list[dict[str, float]]:
    return [{key: record[key] for key in COMPUTED} for record in records(run, name)]


def assert_same_checkpoints(first: Path, second: Path) -> None:
    ours, theirs = checkpoint_tensors(first), checkpoint_tensors(second)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def last_step(run: Path, name: str) -> int:
    return int(records(run, name)[-1]["step"])


def kill_after_a_checkpoint(killed: Launched, run: Path) -> int:
    """Kill the run of the name `killed` after it saved; returns the last step that it wrote down."""
    # The save after step 6 waits until the checkpoint of step 3 is complete, however slow the disk.
    wait_for_step(killed, run, 7, "killed")
    killed.kill()
    return last_step(run, "killed")


def assert_equals_the_uninterrupted(run: Path, ranks: int, steps: int) -> None:
    """Compare the run of the name `killed`, which ended after some steps, with a run that was left alone."""
    train_to_end(run, f"train.max_steps={steps}", ranks=ranks).require(0)
    assert [record["step"] for record in records(run)] == list(range(1, steps + 1))
    assert computed(run, "killed") == computed(run)
    assert_same_checkpoints(last_checkpoint(run, "killed"), last_checkpoint(run))


@pytest.mark.parametrize(
    ("stage", "precision", "ranks"),
    [
        (0, "fp32", 1),
        (1, "fp32", 2),
        pytest.param(1, "fp32", 1, marks=pytest.mark.slow),
        pytest.param(0, "bf16", 1, marks=pytest.mark.slow),
        pytest.param(1, "bf16", 2, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, scenes: SceneShards, stage: int, precision: str, ranks: int
) -> None:
    """The killed run has loader processes, the resumed one none."""
    run = write_run(tmp_path, scenes, zero={"stage": stage}, precision=precision, **INTERRUPTED)
    with start(run, "name=killed", "data.workers=1", ranks=ranks) as process:
        steps = kill_after_a_checkpoint(process, run) + 8
    resumed = train_to_end(run, "name=killed", f"train.max_steps={steps}", ranks=ranks).require(0)
    assert "resumed from" in resumed.output
    assert_equals_the_uninterrupted(run, ranks, steps)


@pytest.mark.slow
def test_killed_and_stopped_under_the_launcher(tmp_path: Path, scenes: SceneShards) -> None:
    """Killed, resumed by the launcher, stopped by SIGTERM, which leaves a checkpoint, and resumed without it."""
    run = write_run(tmp_path, scenes, zero={"stage": 1}, **INTERRUPTED)
    with launch(run, "name=killed", "data.workers=1", ranks=2) as process:
        steps = kill_after_a_checkpoint(process, run)
    with launch(run, "name=killed", "data.workers=1", "checkpoint.every=0", ranks=2) as process:
        wait_for_step(process, run, steps + 3, "killed")
        process.signal(0, signal.SIGTERM, whole_group=True)
        assert "resumed from" in process.wait().output  # its status is the launcher's own
        process.wait_until_gone()
    stopped = last_checkpoint(run, "killed")
    steps = last_step(run, "killed")
    assert stopped.name == f"step-{steps:08d}"
    resumed = train_to_end(run, "name=killed", f"train.max_steps={steps + 3}", ranks=2).require(0)
    assert f"resumed from {stopped}" in resumed.output
    assert_equals_the_uninterrupted(run, 2, steps + 3)


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory, scenes: SceneShards) -> Path:
    """A finished run of two ranks at stage 1 that saved and evaluated at steps 4 and 8; `eval` in its old form."""
    run = write_run(
        tmp_path_factory.mktemp("two"),
        scenes,
        zero={"stage": 1},
        checkpoint={"every": 4},
        eval={"every": 4, "retrieval": {"shards": str(scenes.gallery), "batch": 5}},
    )
    train_to_end(run, ranks=2).require(0)
    return run


def test_one_rank_goes_on_from_the_checkpoint_of_two(of_two_ranks: Path, tmp_path: Path) -> None:
    checkpoint = of_two_ranks.parent / "tiny" / "checkpoints" / "step-00000004"
    train_to_end(of_two_ranks, f"output={tmp_path}", f"resume={checkpoint}", "eval.every=0").require(0)
    of_one = records(tmp_path / "run.yaml")
    assert [record["step"] for record in of_one] == [5, 6, 7, 8]
    for one, two in zip(of_one, records(of_two_ranks)[4:], strict=True):
        # float32 sums over 8 samples in another order: some 1e-7 a step, which the steps after carry on.
        for key in ("loss", "clip", "distill"):
            assert one[key] == pytest.approx(two[key], rel=1e-5)


def test_ranks_share_the_evaluation(of_two_ranks: Path, scenes: SceneShards) -> None:
    evaluations = records(of_two_ranks, kind="eval")
    assert [record["step"] for record in evaluations] == [4, 8]
    for record in evaluations:
        checkpoint = of_two_ranks.parent / "tiny" / "checkpoints" / f"step-{record['step']:08d}"
        for which in MODELS:
            alone = retrieval_of(checkpoint, scenes.gallery, which)
            assert {key: record[f"{which}/{key}"] for key in alone} == pytest.approx(alone)
            assert record[f"{which}/images"] == 24


def test_damaged_gallery_ends_all_ranks(of_two_ranks: Path, scenes: SceneShards, tmp_path: Path) -> None:
    gallery = tmp_path / "gallery"
    shutil.copytree(scenes.gallery, gallery)
    with next(gallery.glob("*.tar")).open("r+b") as shard:
        shard.truncate(30_000)
    changed = [f"output={tmp_path}", f"eval.retrieval.shards={gallery}", "eval.every=2"]
    finished = train_to_end(of_two_ranks, *changed, ranks=2).require(2)
    assert finished.errors.count("\n") == 1
    assert f"{gallery}/gallery-00000.tar: has 30000 bytes" in finished.errors


def test_max_steps_extends_a_run_and_only_the_newest_checkpoints_stay(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes, checkpoint={"every": 1, "keep_last": 2, "at_start": True})
    folder = tmp_path / "tiny" / "checkpoints"
    train_to_end(run, "train.max_steps=3").require(0)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    shutil.copytree(folder / "step-00000003", folder / "step-00000007.tmp")  # a save that was killed
    moved = ["log.every=2", "data.workers=1", f"data.sources.0.index={tmp_path}/index"]
    shutil.copytree(scenes.train, tmp_path / "index")
    resumed = train_to_end(run, "train.max_steps=5", *moved).require(0)
    assert f"resumed from {folder}/step-00000003" in resumed.output
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000005"]
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4, 5]
    again = train_to_end(run, "train.max_steps=5").require(0)
    assert "nothing left to do" in again.output
    refused = train_to_end(run, "optimizer.lr=0.5", "seed=3").require(2).errors
    assert "step-00000005: seed: 3, was 0; optimizer.lr: 0.5, was " in refused
    assert "train.max_steps" not in resumed.output + again.output
    ended = train_to_end(run, "train.max_steps=1000").require(0)
    assert "train.max_steps: 1000; rule: it ends a run early, and this one's schedules end at step 8\n" in ended.output


def test_init_from_takes_both_models_weights_and_nothing_else(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes, checkpoint={"at_start": True, "every": 0})
    train_to_end(run, "name=old", "train.max_steps=4").require(0)
    train_to_end(run, "name=new", f"init_from={tmp_path}/old", "train.max_steps=2", "optimizer.lr=0.01").require(0)
    assert [(record["step"], record["lr"]) for record in records(run, "new")] == [(1, 0.005), (2, 0.01)]
    manifest = json.loads((tmp_path / "new" / "checkpoints" / "step-00000000" / "manifest.json").read_text())
    assert (manifest["state"]["step"], manifest["state"]["updates"]) == (0, 0)
    old = checkpoint_tensors(last_checkpoint(run, "old"))
    new = checkpoint_tensors(tmp_path / "new" / "checkpoints" / "step-00000000")
    for name, tensor in new.items():
        expected = torch.zeros_like(tensor) if "exp_avg" in name else old[name]
        assert torch.equal(tensor, expected), name
    assert any(not torch.equal(old[f"{name}|weight"], old[f"{name}|ema"]) for name in manifest["parameters"])
    # Started again by the same command line, it goes on.
    again = train_to_end(
        run, "name=new", f"init_from={tmp_path}/old", "train.max_steps=3", "optimizer.lr=0.01"
    ).require(0)
    assert "new/checkpoints/step-00000002 (written at world size 1); " in again.output
    assert records(run, "new")[-1]["step"] == 3


def test_resume_never_stands_back_from_existing_checkpoints(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes, resume="never")
    train_to_end(run, "train.max_steps=1").require(0)
    assert "resume: 'never', but" in train_to_end(run, "train.max_steps=2").require(2).errors


def test_other_shards_are_refused_on_resume(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes)
    train_to_end(run, "train.max_steps=1").require(0)
    assert "the shards of data.sources are not those" in (
        train_to_end(run, f"data.sources.0.shards={scenes.gallery}").require(2).errors
    )


def test_shards_written_anew_are_told_on_resume(tmp_path: Path) -> None:
    """Same names, sizes and counts: the order of samples stays, so the run goes on, but not without a word."""
    shards = write_shards(tmp_path / "shards", [16])
    run = write_run(tmp_path, SceneShards(shards, shards))
    train_to_end(run, "train.max_steps=1").require(0)
    said = "warning: the shards have the names, sizes and counts of those that this run has trained on, but begin with"
    assert said not in train_to_end(run, "train.max_steps=2").require(0).output
    (tar,) = shards.glob("*.tar")
    size = tar.stat().st_size
    write_shard(tar, [sample(number) for number in range(100, 116)])
    assert tar.stat().st_size == size
    index_shards(str(shards), None, workers=1, progress=False)
    assert said in train_to_end(run, "train.max_steps=3").require(0).output


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_stops_at_a_step_with_a_checkpoint(tmp_path: Path, scenes: SceneShards, ranks: int) -> None:
    """The signal reaches the last rank and its loader processes, as a scheduler or the launcher sends it."""
    run = write_run(tmp_path, scenes, train=ENDLESS, zero={"stage": 1})
    with start(run, "data.workers=1", ranks=ranks) as process:
        wait_for_step(process, run, 3)
        process.signal(ranks - 1, signal.SIGTERM, whole_group=True)
        finished = process.wait().require(0)
    checkpoint = last_checkpoint(run)
    assert f"checkpoint: {checkpoint}" in finished.output
    assert "stopping after step" in finished.output
    assert records(run)[-1]["step"] == int(checkpoint.name.removeprefix("step-"))
    assert finished.errors == ""


def test_max_minutes_stops_with_a_checkpoint(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes, train={**ENDLESS, "max_minutes": 0.04})
    finished = train_to_end(run).require(0)
    assert "train.max_minutes" in finished.output
    assert f"checkpoint: {last_checkpoint(run)}" in finished.output


def test_killed_rank_ends_the_others_in_one_line(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes, train=ENDLESS, zero={"stage": 1}, checkpoint={"at_start": True, "every": 0})
    with start(run, ranks=2) as process:
        wait_for_step(process, run, 2)
        process.wait_until(lambda: newest(tmp_path / "tiny" / "checkpoints") is not None, "the first checkpoint")
        process.signal(1, signal.SIGKILL)
        finished = process.wait()
    assert finished.statuses == [1, -signal.SIGKILL]
    assert len(finished.errors.splitlines()) == 1, finished.errors
    assert "rank 0 lost contact with another rank" in finished.errors
    assert "step-00000000" in finished.errors
