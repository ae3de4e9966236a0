"""Whole runs that lose a shard, at two world sizes, and runs by the other decoder."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cosmos_scale.checkpoint.state import read_state, step_of
from cosmos_scale.config.load import load_config
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.data.shards.index import open_sources
from cosmos_scale.data.training.order import EpochOrder
from cosmos_scale.testing.runs import last_checkpoint, records, start, train_to_end, wait_for_step, write_run
from cosmos_scale.testing.shard_files import sample, write_shard, write_shards

BATCH = 8
# Float32 sums of one rank's rows or of two ranks': the limit for one run at any world size.
SAME_LOSS = 1e-5
# Views that differ by rounding (about a grey level of 255) move the first steps' losses of 8 samples by less.
SIMILAR_LOSS = 0.05


def write_lossy_run(folder: Path, shards: int, **data: Any) -> Path:
    """A run whose every step reads one shard, in an order that the config gives."""
    source = write_shards(folder / "shards", [BATCH] * shards)
    sections = {
        "sources": [{"name": "test", "shards": str(source)}],
        "window": BATCH,
        "max_damaged": 0.2,
        "remote": {"retries": 1, "backoff_s": 0.01},
    }
    run = write_run(folder, SceneShards(source, source), data={**sections, **data})
    assert load_config(run).train.global_batch == BATCH
    return run


def shard_of_step(run: Path, step: int) -> Path:
    """The shard that a step of the first epoch reads; steps count from 0."""
    config = load_config(run)
    index = open_sources(config.data.sources)
    order = EpochOrder(index.source_shards(), config.seed, config.data.window)
    samples = order.sample_ids(0, np.arange(step * BATCH, (step + 1) * BATCH))
    (shard,) = {index.locate(number).shard for number in samples.tolist()}
    return Path(shard)


def damages(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.parent / name / "damaged.jsonl").read_text().splitlines()]


def assert_lost(run: Path, name: str, shard: Path, step: int, output: str) -> None:
    """The loss at a step (from 0) stands in the run's state, once in its record, and on the console."""
    assert read_state(last_checkpoint(run, name)).lost_shards == {f"test/{shard.name}": step}
    (line,) = [line for line in output.splitlines() if "is lost" in line]
    assert line.startswith(f"shard test/{shard.name} is lost: No such file or directory")
    assert f"from step {step + 1} on others take the place of its 8 samples" in line
    (record,) = damages(run, name)
    assert (record["step"], record["sample"], record["shard"]) == (step, None, str(shard))
    replaced = {entry["step"]: entry["substituted"] for entry in records(run, name) if entry["substituted"]}
    assert replaced == {step + 1: BATCH}


def test_a_lost_shard_is_the_same_loss_at_every_world_size_and_after_a_restart(tmp_path: Path) -> None:
    run = write_lossy_run(tmp_path, 12)
    shard = shard_of_step(run, 5)
    train_to_end(run, "train.max_steps=3", ranks=2).require(0)
    other = f"output={run.parent / 'other'}"
    shutil.copytree(run.parent / "tiny", run.parent / "other" / "tiny")
    shard.unlink()
    alone = train_to_end(run).require(0)
    assert_lost(run, "tiny", shard, 5, alone.output)
    pair = train_to_end(run, other, "train.max_steps=7", ranks=2).require(0)
    assert_lost(run, "other/tiny", shard, 5, pair.output)
    # The shard comes back, but the run goes on without it.
    number = int(shard.stem) * BATCH
    write_shard(shard, [sample(number + place) for place in range(BATCH)])
    assert ", which has lost 1 shard; " in train_to_end(run, other).require(0).output
    assert read_state(last_checkpoint(run, "other/tiny")).lost_shards == {f"test/{shard.name}": 5}
    one, two = ({entry["step"]: entry["loss"] for entry in records(run, name)} for name in ("tiny", "other/tiny"))
    assert list(one) == list(two) == list(range(1, 9))
    assert one == pytest.approx(two, rel=SAME_LOSS)


def test_a_shard_deleted_under_two_ranks_costs_its_samples(tmp_path: Path) -> None:
    run = write_lossy_run(tmp_path, 40, workers=1, prefetch=1)
    shard = shard_of_step(run, 34)
    steps = ("train.schedule_steps=40", "train.max_steps=36", "name=deleted")
    with start(run, *steps, ranks=2) as process:
        wait_for_step(process, run, 1, "deleted")
        shard.unlink()
        finished = process.wait().require(0)
    assert_lost(run, "deleted", shard, 34, finished.output)


@pytest.mark.parametrize("ranks", [1, 2])
def test_more_lost_than_allowed_ends_all_ranks_in_one_line(tmp_path: Path, ranks: int) -> None:
    run = write_lossy_run(tmp_path, 40)
    with start(run, "train.schedule_steps=40", "data.max_damaged=0.1", ranks=ranks) as process:
        wait_for_step(process, run, 1)
        for shard in (run.parent / "shards").glob("*.tar"):
            shard.unlink()
        finished = process.wait().require(2)
    (line,) = finished.errors.splitlines()
    assert "is lost: No such file or directory" in line
    # The steps before are saved: with the data back, the run goes on, and reads all but the four that were given up.
    assert step_of(last_checkpoint(run)) == records(run)[-1]["step"] >= 1
    assert len(read_state(last_checkpoint(run)).lost_shards) <= 4
    # Five of 40 shards are too many. When ranks look for substitutes, each rank may find another shard lost.
    assert re.search(
        r"[56] lost shards hold 1[25]\.[05]0% of all samples, more than data\.max_damaged 0\.1 allows", line
    )


def test_a_disk_that_is_not_there_is_told_before_a_run_goes_on(tmp_path: Path) -> None:
    run = write_lossy_run(tmp_path, 12, remote={"retries": 5, "backoff_s": 100.0})
    train_to_end(run, "train.max_steps=1").require(0)
    shards = sorted((run.parent / "shards").glob("*.tar"))
    for shard in shards[1:]:
        shard.unlink()
    (line,) = train_to_end(run, ranks=2).require(2).errors.splitlines()
    assert f"shard test/{shards[1].name} is missing: No such file or directory; 11 missing shards" in line
    assert "hold 91.67% of all samples, more than data.max_damaged 0.2 allows" in line


def test_both_decoders_train_alike(tmp_path: Path, scenes: SceneShards) -> None:
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI, which has no wheel for this machine")
    run = write_run(tmp_path, scenes)
    for decoder in ("torch", "dali"):
        train_to_end(run, f"name={decoder}", f"data.decoder={decoder}", "train.max_steps=3", ranks=2).require(0)
    expected, made = ([entry["loss"] for entry in records(run, name)] for name in ("torch", "dali"))
    assert made == pytest.approx(expected, rel=SIMILAR_LOSS)
    assert made != expected
