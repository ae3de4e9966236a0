"""Ranks and loader processes that stand still: each rank's stacks are written, the rank is named, and all end."""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.engine.contact import Contact, Peer, read_line
from cosmos_scale.run.watchdog import Watchdog
from cosmos_scale.testing.runs import SECONDS, Launched, records, start, train_to_end, wait_for_step, write_run
from tests.run import stuck_wandb_train
from tests.run.hanging_train import SLOW, SLOW_BATCH, STAYS

HOST = socket.gethostname()
LIMIT = 8  # seconds of a step; the start, which is slow on a busy machine, gets four times as many
ENDS_WITHIN = 120.0  # seconds from a standstill on


@pytest.fixture
def run(tmp_path: Path, scenes: SceneShards) -> Path:
    """A run that does not come to its end here, with a limit of a few seconds."""
    train = {"global_batch": 8, "schedule_steps": 4000, "watchdog_seconds": LIMIT}
    return write_run(tmp_path, scenes, train=train, zero={"stage": 1}, checkpoint={"every": 0})


def stacks(run: Path, rank: int) -> str:
    return (run.parent / "tiny" / f"hang-rank-{rank}.txt").read_text()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_by_the_other(run: Path, stopped: int) -> None:
    with start(run, ranks=2) as process:
        wait_for_step(process, run, 3)
        process.signal(stopped, signal.SIGSTOP)
        process.wait_until_ended(1 - stopped, ENDS_WITHIN)
        process.signal(stopped, signal.SIGKILL)
        finished = process.wait()
    assert finished.statuses[1 - stopped] == 1
    # On a busy machine the start has a warning too, of either rank.
    silent = [line for line in finished.errors.splitlines() if f"rank {stopped} on host {HOST} does not answer" in line]
    assert f" s: rank {stopped} on host {HOST} does not answer; rank {1 - stopped} on" in silent[-2]
    assert f"; rule: train.watchdog_seconds, {LIMIT}" in silent[-1]
    assert "train.py" in stacks(run, 1 - stopped)


@pytest.mark.parametrize("stays", [0, 1])
def test_an_endless_collective_ends_all_ranks_with_their_stacks(
    run: Path, stays: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STAYS, str(stays))
    with start(run, ranks=2, program="tests.run.hanging_train") as process:
        finished = process.wait().require(1)
    assert f"rank 0 on host {HOST}, rank 1 on host {HOST}: step 3; stacks: " in finished.errors
    assert "in step\n" in stacks(run, stays)
    assert "hanging_train.py" in stacks(run, stays)
    waits, last = [stacks(run, rank).splitlines()[:4] for rank in (1 - stays, stays)]
    assert re.search(r": step 3 \(since 20[-0-9]+ [0-9:]+\) for \d+ s without progress$", waits[0])
    assert re.search(r"^last collective: \w+, called in cosmos_scale/\w+/\w+\.py, line \d+, has not come", waits[1])
    assert last[1] == "last collective: all that the main thread has called have come back"
    begun = [[int(line.rpartition(": ")[2]) for line in lines[2:]] for lines in (waits, last)]
    assert begun[0][0] > begun[1][0]  # the one that stays is behind
    assert waits[2].startswith("collectives begun in the group of tensors: ")


def test_a_loader_process_that_stands_still_ends_the_run(run: Path) -> None:
    with start(run, "data.workers=1") as process:
        wait_for_step(process, run, 3)
        (worker,) = children(process)
        os.kill(worker, signal.SIGSTOP)
        finished = process.wait(ENDS_WITHIN).require(1)
        process.wait_until_gone()
    (end,) = [line for line in finished.errors.splitlines() if "; stacks: " in line]
    assert f"rank 0 on host {HOST}: its wait for the batch of step " in end


def test_stacks_that_cannot_be_written_are_told_and_all_ranks_end(run: Path) -> None:
    folder = run.parent / "tiny"
    (folder / "hang-rank-0.txt").mkdir(parents=True)
    path = folder / "hang-rank-1.txt"
    with start(run, ranks=2, program="tests.run.hanging_train") as process, almost_full_pipe(path):
        finished = process.wait().require(1)
    end, unwritten = finished.errors.splitlines()[-2:]
    assert f"rank 0 on host {HOST}, rank 1 on host {HOST}: step 3; stacks: " in end
    assert unwritten.endswith(
        f"stacks not written: rank 0 on host {HOST}: Is a directory; "
        f"rank 1 on host {HOST}: they were not written within 10 s"
    )


def test_the_stacks_of_an_earlier_standstill_stay(tmp_path: Path) -> None:
    """A launch starts again after one, and may stand still again."""
    for _ in range(3):
        Watchdog(1800.0, tmp_path, Contact(0, {}), list)._write_stacks()
        (tmp_path / "hang-rank-0.txt").open("a").write("seen\n")
    names = ["hang-rank-0.txt", "hang-rank-0.txt.old", "hang-rank-0.txt.old-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all((tmp_path / name).read_text().count("seen\n") == 1 for name in names)


def test_a_rank_that_comes_back_changes_nothing(run: Path) -> None:
    silent = f"rank 1 on host {HOST} does not answer"
    with start(run, "train.watchdog_seconds=12", "train.max_steps=40", ranks=2) as process:
        wait_for_step(process, run, 3)
        process.signal(1, signal.SIGSTOP)
        process.wait_until(lambda: silent in process._read("err"), "the warning")
        process.signal(1, signal.SIGCONT)
        finished = process.wait().require(0)
    assert len(re.findall(rf"no progress for \d s: {re.escape(silent)}", finished.errors)) == 1
    assert "progress again" in finished.errors
    train_to_end(run, "name=whole", "train.max_steps=40", ranks=2).require(0)
    losses = [record["loss"] for record in records(run)]
    assert losses == [record["loss"] for record in records(run, "whole")]


def test_a_slow_rank_is_named_by_its_own_time(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks have the same step time, since all wait for the slow one."""
    monkeypatch.setenv(SLOW, "1.5")
    options = ["train.watchdog_seconds=0", "log.every=2", "train.max_steps=4"]
    finished = train_to_end(run, *options, ranks=2, program="tests.run.hanging_train").require(0)
    (line,) = [line for line in finished.output.splitlines() if line.startswith("slow at step")]
    assert line.startswith(f"slow at step 4: rank 1 on host {HOST}, data wait ")
    first, second = records(run)
    for record in (first, second):
        assert record["own_seconds_rank"] == 1
        assert record["own_seconds_max"] >= 1.5
        assert record["own_seconds_median"] < record["own_seconds_max"]


def test_a_long_evaluation_that_goes_on_is_no_standstill(
    run: Path, scenes: SceneShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SLOW_BATCH, "0.5")
    section = f'{{kind: retrieval, shards: "{scenes.gallery}", every: 2, batch: 1, max_samples: 16}}'  # 2 x 8 s
    options = [f"eval=[{section}]", "train.max_steps=3", f"train.watchdog_seconds={LIMIT}"]
    finished = train_to_end(run, *options, program="tests.run.hanging_train").require(0)
    assert "does not answer" not in finished.errors
    assert [record["step"] for record in records(run, kind="eval")] == [2, 3]


def test_a_standstill_between_steps_is_told_long_before_the_limit(tmp_path: Path) -> None:
    """As a link that is cut for a minute or two, where the limit is half an hour."""
    watchdog = Watchdog(1800.0, tmp_path, Contact(0, {}), list)
    assert watchdog._told_after(watchdog._phase, 4 * 1800.0) == 1800.0  # the start takes long
    for _ in range(3):
        watchdog.step_done()
    watchdog.enter("step 4")
    assert watchdog._told_after(watchdog._phase, 1800.0) == 30.0
    watchdog._step_seconds = 20.0
    assert watchdog._told_after(watchdog._phase, 1800.0) == 100.0
    with watchdog.longer("an evaluation"):
        assert watchdog._told_after(watchdog._phase, 4 * 1800.0) == 1800.0


def test_the_last_word_of_a_rank_that_ends_is_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it comes while the rank is asked, whose process ends before it answers."""
    monkeypatch.setattr("cosmos_scale.run.watchdog.ANSWER", SECONDS)
    here, there = socket.socketpair()
    with here, there:
        contact = Contact(1, {0: Peer(0, "first", here)})
        watchdog = Watchdog(1800.0, tmp_path, contact, list)
        contact.listen(watchdog._hear)
        contact.watch()
        asked = threading.Thread(
            target=lambda: there.sendall(b"" if read_line(there, SECONDS) != "watch ask" else LAST)
        )
        asked.start()
        assert watchdog._ask() == {}
        asked.join()
        assert watchdog._found({}) == f"rank 0 on host first, rank 1 on host {HOST}: the start of the run"
        contact._parted = True  # nothing that follows is a loss


@pytest.mark.parametrize("last", [b"", b"watch hangs step 3\n"])
def test_where_a_rank_is_lost_the_others_are_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bytes
) -> None:
    """As one that is killed just before a standstill is found, or just after it has found it."""
    monkeypatch.setattr("cosmos_scale.engine.contact.SECONDS_TO_END", 1e6)
    here, there = socket.socketpair()
    to_lost, lost = socket.socketpair()
    with here, there, to_lost:
        contact = Contact(0, {1: Peer(1, "lost", to_lost), 2: Peer(2, "other", here)})
        watchdog = Watchdog(1800.0, tmp_path, contact, list)
        contact.listen(watchdog._hear)
        contact.watch()
        with lost:
            lost.sendall(last)
        assert contact.lost_within(5.0) == "rank 1 on host lost has ended"
        asked = threading.Thread(target=_answer, args=(there,))
        asked.start()
        assert watchdog._ask() == {}
        asked.join()
        assert "rank 2 on host other: step 9" in watchdog._found({})
        contact._parted = True


def _answer(connection: socket.socket) -> None:
    while read_line(connection, 5.0) not in ("watch ask", ""):
        pass
    time.sleep(0.2)  # as a busy rank
    connection.sendall(b"watch does step 9\n")


def test_a_loss_that_rank_0_tells_is_not_told_by_the_watchdog_of_another() -> None:
    here, there = socket.socketpair()
    with here, there:
        contact = Contact(1, {0: Peer(0, "first", here)})
        contact._hear(contact._peers[0], "lost rank 2 on host other has ended")
        assert contact.lost == "rank 2 on host other has ended"
        assert not contact.end()


def test_a_rank_that_ends_answers_to_the_last(tmp_path: Path) -> None:
    here, there = socket.socketpair()
    with here, there:
        contact = Contact(1, {0: Peer(0, "first", here)})
        with Watchdog(1800.0, tmp_path, contact, list) as watchdog:
            watchdog.enter("step 7")
        watchdog._hear(0, "ask")
        assert read_line(there, 5.0) == "watch does its end, after step 7"


LAST = b"watch hangs the start of the run\n"


class Ended(Exception):
    """In the place of the process's end."""


@pytest.mark.parametrize("who", ["watchdog", "contact"])
def test_the_process_ends_also_where_no_thread_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def end(status: int) -> None:
        raise Ended(status)

    contact = Contact(0, {})
    contact.lost = "rank 1"
    monkeypatch.setattr("cosmos_scale.engine.contact.SECONDS_TO_END", 0.0)
    monkeypatch.setattr(threading.Thread, "start", fail)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended, match="1"):
        Watchdog(1.0, tmp_path, contact, list)._end() if who == "watchdog" else contact._watch()


def test_no_limit_watches_nothing(tmp_path: Path) -> None:
    contact = Contact(0, {})
    with Watchdog(0.0, tmp_path, contact, list) as watchdog:
        watchdog.enter("step 1")
    assert contact._listener is None


@contextmanager
def almost_full_pipe(path: Path) -> Iterator[None]:
    """A named pipe that takes the first lines of stacks, and hangs then."""
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(pipe, b"." * 4096)
    os.read(pipe, 4096)
    os.write(pipe, b"." * 2000)
    yield
    os.close(pipe)


def children(process: Launched) -> list[int]:
    pid = process.processes[0].pid
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


@pytest.mark.slow
def test_the_end_of_the_records_may_take_what_it_waits_for_others(tmp_path: Path, scenes: SceneShards) -> None:
    """All is saved by then: a process of Weights & Biases that is stuck makes no failed run of it."""
    log = {"every": 1, "progress": False, "wandb": {"project": "scenes", "mode": "offline"}}
    run = write_run(tmp_path, scenes, log=log)
    options = ["train.max_steps=2", f"train.watchdog_seconds={stuck_wandb_train.LIMIT}"]
    ended = train_to_end(run, *options, ranks=2, program="tests.run.stuck_wandb_train").require(0)
    assert "stacks" not in ended.errors
