"""What stops a launch, or must not: second interrupts, dead launchers and agents, outputs that nobody takes."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cosmos_scale.exit_status import FAILED, FINISHED, INTERRUPTED, STOPPED
from tests.launch.launches import SECONDS, Launch, launched, lives, run_to_end


def test_a_second_interrupt_ends_all_at_once(tmp_path: Path) -> None:
    with launched(tmp_path / "run", "*:ignore") as launch:
        pids = [launch.pid_of(rank) for rank in range(2)]
        launch.signal(signal.SIGINT)
        launch.wait_until(lambda: "SIGINT: the ranks stop" in launch.text(), "the first")
        launch.signal(signal.SIGINT)  # the same wish
        time.sleep(1.1)
        launch.signal(signal.SIGINT)
        ended = launch.end().require(INTERRUPTED)
    assert "a second Ctrl-C: the ranks are ended at once" in ended.errors
    assert not any(map(lives, pids))


def test_a_stop_waits_however_long_unless_it_has_a_limit(tmp_path: Path) -> None:
    with launched(tmp_path / "run", "*:ignore", stop_limit=0.5, restarts=0) as launch:
        pids = [launch.pid_of(rank) for rank in range(2)]
        launch.signal(signal.SIGTERM)
        ended = launch.end().require(STOPPED)  # no step was done, so nothing is lost
    assert "the ranks that are left are killed" in ended.errors
    assert not any(map(lives, pids))


def test_a_stop_that_loses_steps_fails(tmp_path: Path) -> None:
    with launched(tmp_path / "run", "0:step~7", "*:ignore", stop_limit=0.5) as launch:
        launch.pid_of(0)
        launch.pid_of(1)
        launch.signal(signal.SIGTERM)
        ended = launch.end().require(FAILED)
    assert "the stop did not end well: rank " in ended.errors


def test_ranks_stop_with_a_checkpoint_when_their_launcher_is_killed(tmp_path: Path) -> None:
    with launched(tmp_path / "run", "*:wait") as launch:
        pids = [launch.pid_of(rank) for rank in range(2)]
        launch.process.kill()
        launch.wait_for("saved-0", "saved-1")
        launch.wait_until(lambda: not any(map(lives, pids)), "the ranks' end")


def _agent_of(rank: int) -> int:
    """The process that has started a rank's."""
    return int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])


def test_ranks_stop_with_a_checkpoint_when_their_agent_is_killed(tmp_path: Path) -> None:
    with launched(tmp_path / "run", "*:wait", restarts=0) as launch:
        pids = [launch.pid_of(rank) for rank in range(2)]
        os.kill(_agent_of(pids[0]), signal.SIGKILL)
        launch.wait_for("saved-0", "saved-1")
        launch.wait_until(lambda: not any(map(lives, pids)), "the ranks' end")
        ended = launch.end().require(FAILED)
    assert "is lost (exit status -9)" in ended.errors


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_to_the_launch_and_its_agent_is_one_stop(tmp_path: Path, name: str) -> None:
    """As schedulers and service managers send it, to all processes of a job; ranks end by a stop of their own."""
    with launched(tmp_path / "run", "0:step~7", "*:wait", restarts=0) as launch:
        agent = _agent_of(launch.pid_of(0))
        launch.pid_of(1)
        os.kill(agent, getattr(signal, name))
        launch.signal(getattr(signal, name))
        ended = launch.end().require(STOPPED)
    assert "is lost" not in ended.errors
    assert (tmp_path / "run" / "saved-0").exists()
    assert (tmp_path / "run" / "saved-1").exists()


@pytest.mark.parametrize("event", ["closed", "never read", "neither output read"])
def test_an_output_that_nobody_takes_ends_nothing(tmp_path: Path, event: str) -> None:
    """Rank 0 prints 1 MB, more than a pipe holds. faulthandler: a launch that does not end prints its stacks."""
    folder = tmp_path / "run"
    folder.mkdir()
    words = [*(["0:say~" + "x" * 5000] * 200), "*:step~1"]
    fields = '{"hosts": [[["localhost", 2]]]}'
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.launch.driver", str(folder), fields, *words]
    with (folder / "err").open("wb") as err:
        errors = subprocess.STDOUT if event == "neither output read" else err
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        assert process.stdout is not None
        if event == "closed":
            process.stdout.close()
        try:
            assert process.wait(SECONDS) == FINISHED, (folder / "err").read_text()
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            process.wait(SECONDS)
            with suppress(ProcessLookupError):  # nobody is left of its group
                os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"does not end: {(folder / 'err').read_text()}")
        process.stdout.close()
    assert len((folder / "logs" / "localhost-0.log").read_text()) > 1_000_000
    if event == "closed":
        said = (folder / "err").read_text()
        assert said.count("warning: standard output: Broken pipe; the run goes on without it") == 1, said


def test_a_closed_terminal_stops_nothing_under_nohup(tmp_path: Path) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # children inherit it
    try:
        with launched(tmp_path / "run", "*:wait") as launch:
            launch.pid_of(0)
            launch.pid_of(1)
            launch.signal(signal.SIGHUP)
            time.sleep(0.5)
            assert not (tmp_path / "run" / "saved-0").exists()
            launch.signal(signal.SIGTERM)
            launch.end().require(STOPPED)
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_full_disk_under_the_ranks_files_ends_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "logs").write_text("no folder")
    ended = run_to_end(folder, "*:say~here").require(FINISHED)
    assert "here" in ended.output.splitlines()
    assert "cannot be written" in ended.errors


@pytest.mark.parametrize("event", ["Ctrl-C", "closed"])
def test_a_terminal_stops_with_a_checkpoint(tmp_path: Path, event: str) -> None:
    """Ctrl-C at a terminal, and a terminal that is closed: then nothing can be written to it any more either."""
    folder = tmp_path / "run"
    folder.mkdir()
    ours, theirs = pty.openpty()
    fields = '{"hosts": [[["localhost", 2]]]}'
    command = [sys.executable, "-m", "tests.launch.driver", str(folder), fields, "*:say~here", "*:wait", "*:say~end"]

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=take_terminal
    )
    os.close(theirs)
    launch = Launch(folder, process)
    try:
        pids = [launch.pid_of(rank) for rank in range(2)]
        if event == "Ctrl-C":
            os.write(ours, b"\x03")
        else:
            os.close(ours)
        assert process.wait(SECONDS) == STOPPED
        assert not any(map(lives, pids))
        assert (folder / "saved-0").exists()
        assert (folder / "saved-1").exists()
    finally:
        process.kill()
        process.wait()
        if event == "Ctrl-C":
            os.close(ours)
