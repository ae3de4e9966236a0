"""A run's folder belongs to one launch, whatever starts the ranks: a second start is refused, a dead one forgotten."""

import errno
import fcntl
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from cosmos_scale.cli.main import main
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.run.lock import LAUNCH_TOKEN, LOCK_FILE, RunLock, launcher_holds
from cosmos_scale.testing.runs import (
    SECONDS,
    Launched,
    last_checkpoint,
    records,
    start,
    train_to_end,
    wait_for_step,
    write_run,
)

HELD = rf"on host {re.escape(socket.gethostname())} by process (\d+) since 20\d\d-\d\d-\d\d "


@pytest.fixture
def run(tmp_path: Path, scenes: SceneShards) -> Path:
    """A run that does not come to its end here."""
    return write_run(tmp_path, scenes, train={"global_batch": 8, "schedule_steps": 4000})


def test_a_second_start_is_refused_and_the_first_one_goes_on(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with start(run, ranks=2) as first:
        wait_for_step(first, run, 2)
        second = train_to_end(run, ranks=2).require(2)
        (line,) = second.errors.splitlines()
        holder = re.search(f"tiny: this run is launched already, {HELD}", line)
        assert holder is not None, line
        assert int(holder[1]) == first.processes[0].pid
        assert line.endswith("or give this run another name (rank 0)")
        assert main(["train", "--dry-run", str(run)]) == 0  # which takes no lock
        table = " ".join(capfd.readouterr().out.split())
        assert re.search(rf" lock held this run is launched now, {HELD}", table), table
        wait_for_step(first, run, records(run)[-1]["step"] + 2)
        first.signal(1, signal.SIGTERM)
        first.wait().require(0)
    step = int(last_checkpoint(run).name.removeprefix("step-"))
    assert main(["train", "--dry-run", str(run)]) == 0
    assert "  lock " not in capfd.readouterr().out
    train_to_end(run, f"train.max_steps={step + 1}", ranks=2).require(0)
    assert [record["step"] for record in records(run)] == list(range(1, step + 2))


@pytest.mark.parametrize("target", ["disk", "first/checkpoints"])
def test_checkpoints_of_two_runs_in_one_folder_are_refused(
    run: Path, target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each would delete the other's checkpoints as its own old ones."""
    places = [run.parent / name / "checkpoints" for name in ("first", "second")]
    (run.parent / target).mkdir(parents=True)
    for place in places:
        place.parent.mkdir(exist_ok=True)
        if place != run.parent / target:
            place.symlink_to(run.parent / target)
    with start(run, "name=first") as first:
        wait_for_step(first, run, 2, "first")
        (line,) = train_to_end(run, "name=second", "train.max_steps=2").require(2).errors.splitlines()
        expected = f"output: {places[1]} leads to {(run.parent / target).resolve()}, where another run saves, "
        assert expected in line
        assert re.search(f"{HELD}.*; rule: a run's checkpoints lie in a folder of their own$", line), line
        for name, said in (("second", expected), ("first", "this run is launched now")):
            capfd.readouterr()
            assert main(["train", "--dry-run", str(run), f"name={name}"]) == 0
            table = capfd.readouterr().out
            assert "".join(said.split()) in "".join(table.partition("  lock          held ")[2].split()), table
            assert table.count("  lock ") == 1
        first.signal(0, signal.SIGTERM)
        first.wait().require(0)
    train_to_end(run, "name=first", "train.max_steps=1").require(0)  # its own lock is in nobody's way


def test_a_killed_run_holds_nobody_up(run: Path) -> None:
    with start(run, "checkpoint.every=1") as first:
        wait_for_step(first, run, 3)
        first.signal(0, signal.SIGKILL)
        first.wait()
    assert "pid" in (run.parent / "tiny" / LOCK_FILE).read_text()
    finished = train_to_end(run, f"train.max_steps={records(run)[-1]['step'] + 2}").require(0)
    assert "resumed from" in finished.output
    assert "waiting" not in finished.output
    assert (run.parent / "tiny" / LOCK_FILE).read_text() == ""


def test_of_two_starts_at_one_moment_one_trains(run: Path) -> None:
    """As tasks of srun whose variables say nothing of ranks."""
    with start(run) as one, start(run) as other:
        until = time.monotonic() + SECONDS
        while not (has_ended(one) or has_ended(other)):
            assert time.monotonic() < until, "both train, or both wait"
            time.sleep(0.01)
        refused, trains = (one, other) if has_ended(one) else (other, one)
        assert re.search(HELD, refused.wait().require(2).errors)
        wait_for_step(trains, run, 3)
        trains.signal(0, signal.SIGTERM)
        trains.wait().require(0)
    step = int(last_checkpoint(run).name.removeprefix("step-"))
    assert [record["step"] for record in records(run)] == list(range(1, step + 1))


def has_ended(launched: Launched) -> bool:
    return launched.processes[0].exitcode is not None  # type: ignore[union-attr]


def test_an_error_of_the_start_gives_the_lock_back(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr("cosmos_scale.run.run.build_pair", fail)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        main(["train", str(run)])
    assert (run.parent / "tiny" / LOCK_FILE).read_text() == ""


def test_a_file_system_without_locks_is_no_hindrance(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert main(["train", str(run), "train.max_steps=1"]) == 0


def test_the_ranks_of_a_launch_know_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLock(tmp_path, print) as lock:
        assert not launcher_holds(tmp_path)
        monkeypatch.setenv(LAUNCH_TOKEN, lock.token)
        assert launcher_holds(tmp_path)
        monkeypatch.setenv(LAUNCH_TOKEN, "of another launch")
        assert not launcher_holds(tmp_path)
