"""Launches of ranks that end, fail, die and go on: exit statuses, what is said, and what is left."""

import json
import os
import signal
from pathlib import Path

import pytest

from cosmos_scale.exit_status import FAILED, FINISHED, REFUSED, STOPPED
from tests.launch.launches import HERE, launched, lives, run_to_end


def test_ranks_get_their_variables_and_their_output_is_told_apart(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["*:variables", "0:say~first", "1:say~second", "1:err~odd", "*:say~here+is+{rank}", "2:say~"]
    ended = run_to_end(folder, *words, ranks=3, batch=6).require(FINISHED)
    for rank in range(3):
        assert json.loads((folder / f"variables-{rank}").read_text()) == {
            "RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "3",
            "LOCAL_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
        }
    lines = ended.output.splitlines()
    assert {"first", f"{HERE}:1: second", "here is 0"} <= set(lines)
    # Rank 0's line is printed in any case; of the others' it is one more at most, since they may come first.
    assert sum("here is" in line for line in lines) <= 2
    assert f"{HERE}:1: odd" in ended.errors
    log = (folder / "logs" / f"{HERE}-1.log").read_text().splitlines()
    assert sorted(log[1:]) == ["here is 1", "odd", "second"]  # of two streams, whose order is not known
    assert f"3 ranks on {HERE} (3); they meet at 127.0.0.1:29500; GLOO_SOCKET_IFNAME=lo" in ended.errors


def test_a_killed_rank_ends_all_and_is_named_once(tmp_path: Path) -> None:
    with launched(tmp_path / "run", "*:wait", ranks=3, batch=6, restarts=0) as launch:
        pids = [launch.pid_of(rank) for rank in range(3)]
        os.kill(pids[1], signal.SIGKILL)
        ended = launch.end().require(FAILED)
    assert ended.errors.count(f"rank 1 on host {HERE} was ended by SIGKILL; the other ranks are ended") == 1
    assert "0 restarts did not help; newest checkpoint: none" in ended.errors
    assert not any(map(lives, pids))


LOST = "cosmos-scale+train:+rank+0+lost+contact+with+another+rank:+rank+1+on+host+x+has+ended"


@pytest.mark.parametrize(("end", "told"), [("kill~9", 0), ("exit~1", 1)])
def test_what_a_survivor_says_of_a_dead_rank_is_told_where_nothing_better_is_known(
    tmp_path: Path, end: str, told: int
) -> None:
    words = [f"0:err~{LOST}", "1:there", f"1:{end}", "0:outlive~1", "0:exit~1"]
    ended = run_to_end(tmp_path / "run", *words, restarts=0).require(FAILED)
    assert ended.errors.count("rank 1 on host x has ended") == told
    assert (tmp_path / "run" / "logs" / f"{HERE}-0.log").read_text().count("rank 1 on host x has ended") == 1


@pytest.mark.slow
def test_a_rank_that_ignores_everything_is_killed_after_another_has_failed(tmp_path: Path) -> None:
    with launched(tmp_path / "run", "0:ignore", "1:wait", restarts=0) as launch:
        pids = [launch.pid_of(rank) for rank in range(2)]
        os.kill(pids[1], signal.SIGSEGV)
        ended = launch.end().require(FAILED)
    assert "the ranks that are left are killed" in ended.errors
    assert not any(map(lives, pids))


def test_a_restart_cures_what_happens_once(tmp_path: Path) -> None:
    ended = run_to_end(tmp_path / "run", "*:step~3", "1!:exit~1", "*:step~4").require(FINISHED)
    assert "restart 1 of 3 in 0.1 s; newest checkpoint: none" in ended.errors
    assert (tmp_path / "run" / "attempt-1-0").exists()
    log = (tmp_path / "run" / "logs" / f"{HERE}-0.log").read_text()
    assert ", start 1: " in log
    assert ", start 2: " in log


@pytest.mark.parametrize(("words", "seconds"), [([], "0.2"), (["0:further"], "0.1")], ids=["in vain", "with a step"])
def test_the_back_off_grows_only_where_no_further_step_was_done(tmp_path: Path, words: list[str], seconds: str) -> None:
    ended = run_to_end(tmp_path / "run", *words, "0:kill~9", restarts=2).require(FAILED)
    assert "restart 1 of 2 in 0.1 s" in ended.errors
    assert f"restart 2 of 2 in {seconds} s" in ended.errors


def test_a_port_that_another_program_took_is_cured_by_a_restart(tmp_path: Path) -> None:
    words = ["1!:sleep~0.5", "*!:err~MASTER_PORT:+29500+is+taken", "*!:exit~2"]
    ended = run_to_end(tmp_path / "run", *words).require(FINISHED)
    assert "restart 1 of 3" in ended.errors


@pytest.mark.parametrize(
    ("words", "attempts", "said"),
    [
        (["*:err~no+such+key", "*:exit~2"], 1, "ended with exit status 2: a restart will not cure this"),
        (
            ["*!:step~5", "0:err~step+5+of+pid+77", "0:exit~1"],
            2,
            "as before, after step 5: a restart will not cure this",
        ),
        # Steps were done before the status: a restart may cure that, but not twice at one step.
        (["0!:step~5", "*:sleep~0.2", "0:exit~2"], 2, "ended with exit status 2"),
    ],
    ids=["refused", "same step", "refused later"],
)
def test_what_a_restart_does_not_cure_is_not_tried_again(
    tmp_path: Path, words: list[str], attempts: int, said: str
) -> None:
    ended = run_to_end(tmp_path / "run", *words).require(REFUSED)
    assert said in ended.errors
    assert len(list((tmp_path / "run").glob("attempt-*-0"))) == attempts


@pytest.mark.parametrize("resume", ["never", "another/run"])
def test_a_restart_goes_on_from_what_the_launch_has_saved(tmp_path: Path, resume: str) -> None:
    """A named checkpoint, or none, is where the first start begins, and each restart before the first checkpoint."""
    words = ["0:further", "0:sleep~0.05"]
    folder = tmp_path / "run"
    run_to_end(folder, *words, "0:kill~9", restarts=1, resume=resume).require(FAILED)
    assert "resume=auto" not in (folder / "attempt-1-0").read_text()
    run_to_end(folder, *words, "0:save~9", "0:kill~9", restarts=1, resume=resume).require(FAILED)
    assert "resume=auto" not in (folder / "attempt-2-0").read_text()
    assert "resume=auto" in (folder / "attempt-3-0").read_text()


def test_a_lost_host_is_done_without_at_the_size_that_divides(tmp_path: Path) -> None:
    """6 ranks share a batch of 24; of the 5 left 4 go on: 6 samples a rank, where it had 4, so in two micro-batches."""
    hosts = [[[HERE, 2], ["localhost", 4]], [[HERE, 5]]]
    with launched(tmp_path / "run", "1!:kill~9", "0!:wait", "2!:wait", "3!:wait", hosts=hosts, batch=24) as launch:
        ended = launch.end().require(FINISHED)
    said = "4 of 6 ranks go on, the global batch stays 24 (2 micro-batches a rank); idle: 1 of the 5 slots of "
    assert f"{said}{HERE}" in ended.errors
    assert "train.micro_batches=2" in (tmp_path / "run" / "attempt-1-0").read_text()


def test_a_new_launch_on_fewer_ranks_keeps_the_size_of_a_micro_batch(tmp_path: Path) -> None:
    """Four ranks had 2 of 8 samples each; one rank has them in four parts, unless the command line says how many."""
    folder = tmp_path / "run"

    def launched_on(ranks: int, *keys: str) -> tuple[str, str]:
        for file in folder.glob("attempt-*"):
            file.unlink()
        errors = run_to_end(folder, *keys, "0:step~3", hosts=[[[HERE, ranks]]]).require(FINISHED).errors
        return (folder / "attempt-0-0").read_text(), errors

    assert launched_on(4)[0] == "0:step~3"
    words, said = launched_on(1)
    assert words == "0:step~3 train.micro_batches=4"
    assert "train.micro_batches=4 in the place of 1, so that a micro-batch has no more samples than in earlier" in said
    assert launched_on(4)[0] == "0:step~3"  # the hosts are back
    assert launched_on(1, "train.micro_batches=1")[0] == "train.micro_batches=1 0:step~3"


def test_restarts_are_counted_anew_after_a_further_checkpoint(tmp_path: Path) -> None:
    """A run of days may lose more ranks than one that gets nowhere."""
    ended = run_to_end(tmp_path / "run", "*:save~2", "0:kill~9", ranks=1, restarts=1).require(FAILED)
    assert ended.errors.count("restart 1 of 1 in ") == 2
    assert len(list((tmp_path / "run").glob("attempt-*-0"))) == 3
    assert "1 restart did not help" in ended.errors


def test_slots_that_do_not_share_the_batch_stay_idle_and_are_named(tmp_path: Path) -> None:
    ended = run_to_end(tmp_path / "run", "*:variables", hosts=[[[HERE, 2], ["localhost", 1]]], batch=8)
    ended.require(FINISHED)
    said = "2 of 3 ranks train, the global batch stays 8 (1 micro-batch a rank); idle: 1 of the 1 slots of localhost"
    assert said in ended.errors
    assert json.loads((tmp_path / "run" / "variables-1").read_text())["WORLD_SIZE"] == "2"


def test_too_few_ranks_are_refused_with_the_sizes_that_would_do(tmp_path: Path) -> None:
    hosts = [[[HERE, 4]], [[HERE, 3]]]
    ended = run_to_end(tmp_path / "run", "1!:exit~1", hosts=hosts, restarts=1, least_ranks=4).require(FAILED)
    said = (
        "--min-ranks: 4, but 2 of the 3 ranks that are left can share train.global_batch 8; ranks that would do: 1, 2"
    )
    assert said in ended.errors


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_to_the_launch_stops_all_ranks_with_a_checkpoint(tmp_path: Path, name: str) -> None:
    with launched(tmp_path / "run", "*:wait") as launch:
        pids = [launch.pid_of(rank) for rank in range(2)]
        launch.signal(getattr(signal, name))
        ended = launch.end().require(STOPPED)
    assert f"{name}: the ranks stop after their step" in ended.errors
    assert (tmp_path / "run" / "saved-0").exists()
    assert (tmp_path / "run" / "saved-1").exists()
    assert not any(map(lives, pids))
