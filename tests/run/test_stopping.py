"""Signals of all kinds, at any time and to any rank: a checkpoint, status 0, and a resume that nothing shows."""

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from functools import partial
from pathlib import Path

import pytest

from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.run.stop_request import TIME_LIMIT, encode_reason, name_reason
from cosmos_scale.testing.runs import (
    SECONDS,
    Finished,
    checkpoint_tensors,
    last_checkpoint,
    records,
    start,
    train_to_end,
    wait_for_step,
    write_run,
)
from tests.conftest import REPOSITORY
from tests.run.hanging_train import IN_THE_STEP
from tests.run.marking_train import MARKS, PLACE

PROGRAM = "tests.run.marking_train"
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP]


@pytest.fixture
def run(tmp_path: Path, scenes: SceneShards) -> Path:
    """A run of 4,000 steps of two ranks, which never comes to its end here."""
    train = {"global_batch": 8, "schedule_steps": 4000}
    return write_run(tmp_path, scenes, train=train, zero={"stage": 1}, checkpoint={"every": 0})


def stopped_after(finished: Finished, run: Path) -> int:
    """Return the step after which a run stopped; its checkpoint is of that step."""
    step = int(last_checkpoint(run).name.removeprefix("step-"))
    assert f"stopping after step {step} of " in finished.output
    assert finished.errors == ""
    return step


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_stops_with_a_checkpoint_and_is_named(run: Path, number: signal.Signals) -> None:
    with start(run) as process:
        wait_for_step(process, run, 2)
        process.signal(0, number)
        finished = process.wait().require(0)
    stopped_after(finished, run)
    assert f" of 4000: {number.name}\n" in finished.output


@pytest.mark.parametrize("receivers", [[1], [0, 1]])
def test_a_run_stopped_by_a_signal_resumes_as_if_nothing_was(run: Path, receivers: list[int]) -> None:
    with start(run, "data.workers=1", ranks=2) as process:
        wait_for_step(process, run, 2)
        for rank in receivers:
            process.signal(rank, signal.SIGUSR1, whole_group=True)
        finished = process.wait().require(0)
    step = stopped_after(finished, run)
    # Both ranks have it: the lower one is named, unless only the other had it in time for this step.
    assert any(f": SIGUSR1 at rank {rank}\n" in finished.output for rank in receivers)
    (stop,) = records(run, kind="stop")
    assert (stop["step"], stop["reason"].partition(" at ")[0]) == (step, "SIGUSR1")
    assert 0 < stop["useful_seconds"] < stop["wall_seconds"]
    train_to_end(run, f"train.max_steps={step + 2}", ranks=2).require(0)
    train_to_end(run, "name=whole", f"train.max_steps={step + 2}", ranks=2).require(0)
    whole = [(record["step"], record["loss"]) for record in records(run, "whole")]
    assert [(record["step"], record["loss"]) for record in records(run)] == whole
    tensors, expected = checkpoint_tensors(last_checkpoint(run)), checkpoint_tensors(last_checkpoint(run, "whole"))
    assert all(tensors[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("place", ["start of ranks", "opening", "save", "evaluation"])
def test_a_signal_during_what_is_no_step_waits_for_the_next_one(
    place: str, run: Path, scenes: SceneShards, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(PLACE, place)
    monkeypatch.setenv(MARKS, str(tmp_path / "mark"))
    evaluation = f'eval=[{{kind: retrieval, name: scenes, shards: "{scenes.gallery}", every: 3}}]'
    with start(run, "checkpoint.every=3", evaluation, ranks=2, program=PROGRAM) as process:
        process.wait_until((tmp_path / "mark-1").exists, place)
        process.signal(1, signal.SIGTERM)
        (tmp_path / "mark-signalled").touch()
        finished = process.wait().require(0)
    assert ": SIGTERM at rank 1\n" in finished.output
    if place in ("save", "evaluation"):
        assert stopped_after(finished, run) == 3
    else:
        assert "stopping after step 0 of 4000" in finished.output


def test_a_second_interrupt_ends_a_rank_that_waits_in_a_library(run: Path) -> None:
    with start(run, ranks=2, program="tests.run.hanging_train") as process:
        # Rank 0 has begun the step too, and waits for rank 1 in a collective.
        process.wait_until(lambda: IN_THE_STEP in process.printed(), "rank 1 in its step")
        process.signal(0, signal.SIGINT)
        time.sleep(1.5)
        until = time.monotonic() + SECONDS
        while process.processes[0].exitcode is None and time.monotonic() < until:  # type: ignore[union-attr]
            process.signal(0, signal.SIGINT)  # again: on a busy machine the first may be heard late
            time.sleep(1.5)
        process.wait_until_ended(0)
        process.kill()
        finished = process.wait()
    assert finished.statuses[0] == 130
    assert finished.errors == "cosmos-scale train: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_start_that_waits_in_a_library(number: signal.Signals) -> None:
    """A lock of the C library, which is taken twice, stands for it: no handler of Python runs there."""
    code = (
        "import ctypes; from cosmos_scale.run import stop_request as stop; stop.START_HELD = 0.5\n"
        "with stop.noted_terminations():\n"
        "    libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
        "    libc.pthread_mutex_lock(lock); print('waits', flush=True); libc.pthread_mutex_lock(lock)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "waits\n"
            time.sleep(0.5)
            process.send_signal(number)
            _, errors = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert errors == f"cosmos-scale: {number.name}: the start hangs in a library, so it is ended\n"


def test_a_closed_terminal_stops_the_run_with_a_checkpoint(run: Path) -> None:
    """The kernel sends SIGHUP, and what is written to the terminal from then on is an error."""
    terminal, side = pty.openpty()
    command = [sys.executable, "-m", "cosmos_scale.cli", "train", str(run), "log.progress=true"]
    with subprocess.Popen(
        command,
        stdin=side,
        stdout=side,
        stderr=side,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)},
    ) as process:
        try:
            os.close(side)
            until = time.monotonic() + SECONDS
            while len(records(run)) < 3 and time.monotonic() < until:
                if select.select([terminal], [], [], 0.1)[0]:
                    os.read(terminal, 1 << 16)
            os.close(terminal)
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()
    assert last_checkpoint(run).name == f"step-{records(run)[-1]['step']:08d}"


def test_a_signal_that_is_repeated_changes_nothing(run: Path) -> None:
    with start(run) as process:
        wait_for_step(process, run, 2)
        until = time.monotonic() + SECONDS
        while process.processes[0].exitcode is None and time.monotonic() < until:  # type: ignore[union-attr]
            process.signal(0, signal.SIGTERM)
            time.sleep(0.02)
            if "tiny" in os.listdir(run.parent) and list((run.parent / "tiny" / "checkpoints").glob("step-*[0-9]")):
                break
        finished = process.wait().require(0)
    stopped_after(finished, run)


def test_reasons_of_ranks_agree_on_a_signal_and_the_lowest_rank() -> None:
    code = partial(encode_reason, world_size=4)
    assert code(None, 2) == 0
    every = [code(TIME_LIMIT, 0), code(signal.SIGTERM, 3), code(signal.SIGTERM, 1), code(signal.SIGINT, 0)]
    assert name_reason(max(every), 4) == "SIGTERM at rank 1"
    assert name_reason(code(TIME_LIMIT, 2), 4) == "train.max_minutes is over"
    assert name_reason(encode_reason(signal.SIGXCPU, 0, 1), 1) == "SIGXCPU"
