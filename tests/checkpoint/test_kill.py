"""Training killed with SIGKILL while it saves, fifty times in all, against runs that were left alone."""

import random
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cosmos_scale.checkpoint.files import TensorFile
from cosmos_scale.checkpoint.state import checkpoints, newest, read_manifest, step_of
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.testing.runs import Launched, records, start, train_to_end, write_run

COMPUTED = ("step", "samples", "loss", "clip", "distill", "scale", "distill_scale", "lr", "momentum", "grad_norm")


def last_step(root: Path) -> int:
    folder = newest(root)
    return -1 if folder is None else step_of(folder)


def temporary_folders(root: Path) -> set[tuple[str, int, int]]:
    """Checkpoints under way and old ones being deleted, each as it is now: what a kill has left does not change."""
    found = set()
    for folder in root.glob("step-*.tmp"):
        with suppress(FileNotFoundError):
            status = folder.stat()
            found.add((folder.name, status.st_ino, status.st_mtime_ns))
    return found


def assert_all_whole(root: Path) -> None:
    """Read every byte of all checkpoints."""
    for folder in checkpoints(root):
        for record in read_manifest(folder).files.values():
            file = TensorFile(folder, record)
            file.verify()
            file.close()


def time_saves(process: Launched, root: Path, count: int) -> Iterator[float]:
    """Yield how long some saves of a run take, in seconds, and kill it."""
    for _ in range(count):
        process.wait_until(lambda: bool(temporary_folders(root)), "a save")
        began = time.monotonic()
        process.wait_until(lambda: not temporary_folders(root), "its end")
        yield time.monotonic() - began
    process.kill()


def kill_while_saving(
    process: Launched, root: Path, delay: float, saves: int, rank: int, left: set[tuple[str, int, int]]
) -> None:
    """Kill a run some time into a save of its own, one rank first; left: the temporary folders from before it."""
    first = last_step(root)
    process.wait_until(lambda: "resumed from" in process.printed(), "its start")
    process.wait_until(lambda: last_step(root) >= first + saves, f"{saves} saves")
    while not temporary_folders(root) - left:
        process.wait_until(lambda: bool(temporary_folders(root) - left), "another save")
        end = time.monotonic() + delay
        while time.monotonic() < end and temporary_folders(root) - left:
            time.sleep(0.001)
        delay /= 2  # of a save that was shorter than most, nothing is left to hit: the next one
    process.signal(rank, signal.SIGKILL)
    process.kill()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("ranks", "stage", "kills"), [(1, 0, 30), (2, 2, 20)])
def test_killed_while_saving_it_goes_on_from_the_checkpoint_before(
    tmp_path: Path, scenes: SceneShards, ranks: int, stage: int, kills: int
) -> None:
    run = write_run(
        tmp_path,
        scenes,
        zero={"stage": stage},
        train={"schedule_steps": 10_000},
        checkpoint={"every": 1, "keep_last": 2, "at_start": True},
    )
    root = tmp_path / "killed" / "checkpoints"
    generator = random.Random(ranks)
    with start(run, "name=killed", ranks=ranks) as process:
        typical = statistics.median(time_saves(process, root, 5))
    hits = 0
    for _ in range(kills):
        expected, left = last_step(root), temporary_folders(root)
        with start(run, "name=killed", ranks=ranks) as process:
            delay, saves = generator.uniform(0.0, typical), generator.randint(0, 2)
            kill_while_saving(process, root, delay, saves, generator.randrange(ranks), left)
            finished = process.wait()
        assert f"resumed from {root}/step-{expected:08d}" in finished.output, finished
        assert "passed over" not in finished.output
        hits += bool(temporary_folders(root) - left)
        assert last_step(root) >= expected + saves
        assert_all_whole(root)
    print(f"{hits} of {kills} kills hit a save, which takes {1000 * typical:.0f} ms")
    assert hits > kills / 2, f"only {hits} of {kills} kills hit a save: they prove little"
    end = f"train.max_steps={last_step(root) + 2}"
    train_to_end(run, "name=killed", end, ranks=ranks).require(0)
    assert temporary_folders(root) == set()
    train_to_end(run, "name=whole", "checkpoint.every=0", end, ranks=ranks).require(0)
    killed, whole = (
        [{key: record[key] for key in COMPUTED} for record in records(run, name)] for name in ("killed", "whole")
    )
    assert [record["step"] for record in killed] == list(range(1, last_step(root) + 1))
    assert killed == whole
