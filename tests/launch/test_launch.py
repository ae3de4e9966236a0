"""`cosmos-scale launch` with the real trainer on two ranks of this host: to the end, stopped, resumed, refused."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cosmos_scale.cli.main import main
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.exit_status import FAILED, FINISHED, INTERRUPTED, REFUSED, STOPPED
from cosmos_scale.testing.runs import records, write_run
from tests.conftest import REPOSITORY
from tests.launch.launches import SECONDS, Ended, Launch, lives


@contextmanager
def launching(folder: Path, *arguments: str) -> Iterator[Launch]:
    command = [sys.executable, "-m", "cosmos_scale.cli", "launch", "--back-off", "0.1", *arguments]
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
    try:
        yield Launch(folder, process)
    finally:
        process.kill()
        process.wait()


def launch(folder: Path, *arguments: str) -> Ended:
    with launching(folder, *arguments) as process:
        return process.end(2 * SECONDS)


@pytest.mark.slow
def test_a_launch_is_stopped_and_goes_on_to_its_end(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes, train={"schedule_steps": 400, "max_steps": 400})
    with launching(tmp_path, "--ranks", "2", str(run)) as first:
        first.wait_until(lambda: len(records(run)) > 2, "two steps", 2 * SECONDS)
        second = launch_in_own_folder(tmp_path / "second", "--ranks", "1", str(run)).require(REFUSED)
        assert f"this run is launched already, on host {os.uname().nodename} by process {first.process.pid} since" in (
            second.errors
        )
        first.signal(signal.SIGTERM)
        ended = first.end(2 * SECONDS).require(STOPPED)
    steps = records(run)[-1]["step"]
    assert f"stopped after step {steps} of 400; newest checkpoint: {tmp_path}/tiny/checkpoints/step-" in ended.errors
    assert "  network       ok        the ranks meet at 127.0.0.1:" in ended.output
    ended = launch(tmp_path, str(run), f"train.max_steps={steps + 1}").require(FINISHED)
    assert "1 rank on " in ended.errors
    assert f"steps {steps + 1}-{steps + 1}, global batch 8 on 1 rank" in ended.output
    assert records(run)[-1]["step"] == steps + 1


def launch_in_own_folder(folder: Path, *arguments: str) -> Ended:
    folder.mkdir()
    return launch(folder, *arguments)


@pytest.mark.slow
def test_a_limit_of_time_is_a_stop(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes, train={"schedule_steps": 4000, "max_minutes": 0.02})
    ended = launch(tmp_path, "--ranks", "2", str(run)).require(STOPPED)
    assert "stopped before a step was done; newest checkpoint: none" in ended.errors


def test_the_exit_statuses_are_documented() -> None:
    rows = re.findall(r"^\| (\d+) \|", (REPOSITORY / "docs" / "launching.md").read_text(), re.MULTILINE)
    assert [int(row) for row in rows] == sorted({FINISHED, FAILED, REFUSED, STOPPED, INTERRUPTED})


@pytest.mark.slow
def test_a_killed_rank_costs_a_restart_from_the_last_checkpoint(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes, train={"schedule_steps": 60}, checkpoint={"every": 5})
    with launching(tmp_path, "--ranks", "2", str(run)) as process:
        process.wait_until(lambda: len(records(run)) > 12, "twelve steps", 2 * SECONDS)
        (rank,) = ranks_of(process.process.pid, "1")
        os.kill(rank, signal.SIGKILL)
        process.wait_until(lambda: "restart 1 of 3" in process.text(), "the restart", SECONDS)
        ended = process.end(2 * SECONDS).require(FINISHED)
    assert not lives(rank)
    assert "rank 1 on host " in ended.errors
    assert ended.errors.count("was ended by SIGKILL") == 1
    assert "resumed from " in ended.output
    assert records(run)[-1]["step"] == 60


@pytest.mark.slow
def test_a_launch_waits_for_the_ranks_of_one_that_was_killed(tmp_path: Path, scenes: SceneShards) -> None:
    """They end their step and save; else two runs would write one folder, and the checkpoint would come too late."""
    run = write_run(tmp_path, scenes, train={"schedule_steps": 4000})
    with launching(tmp_path, "--ranks", "1", str(run)) as first:
        first.wait_until(lambda: len(records(run)) > 2, "two steps", 2 * SECONDS)
        (rank,) = ranks_of(first.process.pid, "0")
        os.kill(rank, signal.SIGSTOP)  # a step that takes long
        try:
            first.process.kill()
            first.process.wait()
            (tmp_path / "second").mkdir()
            with launching(tmp_path / "second", "--ranks", "1", str(run), "train.max_minutes=0.1") as second:
                said = (
                    f"end of an earlier launch's ranks, the first one on host {socket.gethostname()} by process {rank} "
                )
                second.wait_until(lambda: said in second.text(), "the wait", 2 * SECONDS)
                before = len(records(run))
                os.kill(rank, signal.SIGCONT)
                ended = second.end(2 * SECONDS).require(STOPPED)
        finally:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
    saved = re.search(r"resumed from \S+/step-0*(\d+) ", ended.output)
    assert saved is not None, ended.output
    assert int(saved[1]) >= before > 2
    steps = [record["step"] for record in records(run)]
    assert steps == list(range(1, len(steps) + 1))


def ranks_of(launcher: int, rank: str) -> list[int]:
    """The processes of one rank below a launcher: children of its agent."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            agent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            parent = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if parent == str(launcher) and f"RANK={rank}".encode() in variables:
            found.append(int(process.name))
    return found


def test_a_check_starts_nothing(tmp_path: Path, scenes: SceneShards, capfd: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, scenes)
    assert main(["launch", "--check", "--ranks", "2", str(run)]) == FINISHED
    table = capfd.readouterr().out
    for name in ("hosts", "python", "packages", "sources", "config", "index", "output", "/dev/shm", "GPUs", "clock"):
        assert any(line.split()[:2] == [name, "ok"] for line in table.splitlines()), table
    assert list((tmp_path / "tiny").iterdir()) == []  # not even a token


def test_an_output_folder_that_cannot_be_written_is_told(
    tmp_path: Path, scenes: SceneShards, capfd: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, scenes)
    assert main(["launch", "--check", "--ranks", "2", str(run), f"output={run}"]) == REFUSED
    said = (
        rf"cosmos-scale launch: output: {re.escape(str(run))}/tiny/\.launch-\S+: cannot be written: Not a directory\n"
    )
    assert re.fullmatch(said, capfd.readouterr().err)


def test_gpus_that_do_not_share_the_batch_are_no_reason_to_refuse(
    tmp_path: Path, scenes: SceneShards, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three GPUs two share a batch of 8, and one stays idle; three ranks that are asked for are refused."""
    run = write_run(tmp_path, scenes)
    monkeypatch.setattr("cosmos_scale.cli.launch._ranks_here", lambda device: 3)
    assert main(["launch", "--check", str(run)]) == FINISHED
    assert main(["launch", "--check", "--ranks", "3", str(run)]) == REFUSED
    assert "ranks that would do: 1, 2, 4, 8" in capfd.readouterr().err


def test_a_signal_ends_the_look(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes)
    with launching(tmp_path, "--ranks", "2", str(run)) as process:
        process.wait_until(lambda: any((tmp_path / "tiny").glob(".launch-*")), "the look")
        process.signal(signal.SIGTERM)
        ended = process.end().require(STOPPED)
    assert ended.errors == "cosmos-scale launch: stopped before a step was done; newest checkpoint: none\n"
    assert ended.output == ""


def test_what_is_wrong_on_this_host_is_refused(
    tmp_path: Path, scenes: SceneShards, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path, scenes)
    with socket.create_server(("", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert main(["launch", "--check", "--ranks", "2", str(run), "data.sources.0.shards=/nowhere"]) == REFUSED
    said = capfd.readouterr()
    assert "data          REFUSED   data source scenes: " in said.out
    assert "network       REFUSED   MASTER_PORT: " in said.out
    assert "cosmos-scale launch: data: data source scenes: " in said.err
    assert said.err.count("\n") == 1
    assert "(and 1 more)" in said.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "3"], "multiple of the 3 ranks; ranks that would do: 1, 2, 4, 8"),
        (["--hostfile", "/nowhere/hosts"], "--hostfile: /nowhere/hosts does not exist"),
        (["--ranks", "2", "train.epochs=0"], "train.epochs: 0 "),
    ],
    ids=["ranks", "hostfile", "config"],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    tmp_path: Path, scenes: SceneShards, capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    run = write_run(tmp_path, scenes)
    assert main(["launch", str(run), *arguments]) == REFUSED
    errors = capfd.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "tiny").exists()
