"""The look at hosts that differ: each difference is refused with its host and the way on."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from cosmos_scale.cli.main import main
from cosmos_scale.config.load import load_config
from cosmos_scale.errors import UserError
from cosmos_scale.exit_status import FINISHED, REFUSED
from cosmos_scale.launch.connection import Connection
from cosmos_scale.launch.hostfile import Host, this_host
from cosmos_scale.launch.preflight import LOOKER, look_at
from cosmos_scale.launch.signals import StopSignals
from cosmos_scale.launch.supervise import LaunchedRun
from tests.launch.fake_ssh import write_ssh

THREE: dict[str, dict[str, Any]] = {"a": {"machine": "of a"}, "b": {}, "c": {}}


def check(
    folder: Path, facts: dict[str, Any], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, dict[str, str]]:
    """Look at hosts of 8 slots each; return the exit status and the table's rows, by their names."""
    run = folder / "run.yaml"
    run.write_text(yaml.safe_dump({"name": "run", "output": str(folder), "train": {"global_batch": 960}}))
    (folder / "hosts").write_text("".join(f"{name} slots=8\n" for name in ("a", "b", "c")))
    monkeypatch.setenv("PATH", f"{write_ssh(folder / 'bin', facts)}:{os.environ['PATH']}")
    status = main(["launch", "--check", "--hostfile", str(folder / "hosts"), str(run)])
    rows: dict[str, str] = {}
    name = ""
    for line in capfd.readouterr().out.splitlines():
        name = line[2:16].strip() or name
        rows[name] = f"{rows.get(name, '')} {line[16:].strip()}".strip()
    return status, {name: " ".join(text.split()) for name, text in rows.items()}


def test_equal_hosts_are_fit(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, rows = check(tmp_path, THREE, capfd, monkeypatch)
    assert status == FINISHED, rows
    assert rows["hosts"].startswith("ok 3 hosts answered; looked at in ")
    assert rows["packages"] == "ok 2 packages: torch 2.9, deepspeed 0.19.8"
    assert rows["GPUs"] == "ok NVIDIA H100, driver 580.1"
    assert rows["network"].startswith("ok the ranks meet at 127.0.0.1:")
    assert {text.split()[0] for text in rows.values()} == {"ok"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == []


def test_a_login_file_that_ends_the_shell_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    connection = Connection(Host("a", 1), LOOKER, tmp_path)
    said = "ssh ended with status 0, before a program started: a file such as .bashrc ends the shell there"
    assert connection.reason() == said
    connection.hang_up()


def test_a_login_script_that_waits_for_standard_input_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\ncat > taken\n")
    ssh.chmod(0o755)
    (tmp_path / "run.yaml").write_text(f"name: run\noutput: {tmp_path}\ntrain: {{global_batch: 8}}\n")
    (tmp_path / "hosts").write_text("b slots=8\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("cosmos_scale.launch.connection.START_SECONDS", 0.5)
    assert main(["launch", "--check", "--hostfile", "hosts", "run.yaml"]) == REFUSED
    said = "hosts: b does not answer: no program has started there within 0.5 s, perhaps since a login script, such as"
    assert said in capfd.readouterr().err
    assert (tmp_path / "taken").read_text() == ""  # a script that reads for some seconds takes no message


@pytest.mark.parametrize(
    ("changes", "row", "said"),
    [
        ({"machine": "of a"}, "GPUs", "b and a are one machine; rule: one line a machine in the hostfile"),
        ({"python": "3.10.1"}, "python", "b has 3.10.1, a, c has 3.11.7; rule: install one version of Python"),
        (
            {"packages": {"torch": "2.8", "deepspeed": "0.19.8"}},
            "package torch",
            "b has torch 2.8, a, c has torch 2.9; rule: install one version of it",
        ),
        ({"packages": {"torch": "2.9"}}, "package deepsp", "b has deepspeed none, a, c has deepspeed 0.19.8"),
        ({"sources": "89ab"}, "sources", "b has 89ab, a, c has 0123; rule: the same files of cosmos_scale"),
        ({"overrides": ["log.every=7"]}, "config", "b and a differ in log.every; rule: one run's keys"),
        ({"errors": {"config": "no such file"}}, "config", "b: no such file; rule: the run's file and its bases"),
        ({"errors": {"data": "no index at /x"}}, "data", "b: no index at /x; rule: each host has the shards"),
        ({"index": "cdef"}, "index", "b has cdef, a, c has 4567; rule: copy the index along with the shards"),
        ({"errors": {"output": "Read-only file system"}}, "output", "b: Read-only file system; rule: a folder that"),
        ({"gpus": ["NVIDIA H100"] * 7}, "GPUs", "b has 7 GPUs for 8 ranks; rule: no more slots than GPUs"),
        ({"gpus": []}, "GPUs", "b has 0 GPUs for 8 ranks"),
        ({"shared_memory": 2**26}, "/dev/shm", "b has 64 MiB left, 8 ranks need 256; rule: enlarge it"),
        ({"clock": 60}, "clock", "b is +60.0 s off this host's; rule: set clocks by NTP"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_host_that_differs_is_named(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    row: str,
    said: str,
) -> None:
    status, rows = check(tmp_path, THREE | {"b": changes}, capfd, monkeypatch)
    assert status == REFUSED
    assert rows[row].startswith(f"REFUSED {said}"), rows
    assert [name for name, text in rows.items() if text.startswith("REFUSED")] == [row]


def test_other_drivers_are_noted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, rows = check(tmp_path, THREE | {"c": {"driver": "570.2"}}, capfd, monkeypatch)
    assert status == FINISHED
    assert rows["GPUs"] == "note NVIDIA H100, driver 570.2; NVIDIA H100, driver 580.1"


def test_a_host_that_does_not_answer_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, rows = check(tmp_path, {"a": {}, "c": {}}, capfd, monkeypatch)
    assert status == REFUSED
    assert rows["hosts"].startswith("REFUSED b does not answer: ssh: connect to host b port 22: No route to host; rule")
    assert rows["network"].startswith("ok")  # of those that answer all is told at once


def test_an_address_that_others_do_not_reach_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    status, rows = check(tmp_path, THREE, capfd, monkeypatch)
    assert status == REFUSED
    assert "a, b, c does not reach port " in rows["network"]
    assert "at no-such-host.invalid; rule: let the hosts reach each other" in rows["network"]


def test_a_restart_does_without_hosts_that_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump({"name": "run", "output": str(tmp_path)}))
    monkeypatch.setenv("PATH", f"{write_ssh(tmp_path / 'bin', {'a': {}, 'c': {}})}:{os.environ['PATH']}")
    said: list[str] = []
    with StopSignals() as stop:
        look = look_at(LaunchedRun(str(run), (), load_config(run)), said.append, said.append, stop)
        meeting = look([Host("a", 8), Host("b", 8), Host("c", 8)], False)
        assert meeting.hosts == [Host("a", 8), Host("c", 8)]
        assert set(meeting.interfaces) == {"a", "c"}
        assert said == ["host b is gone: ssh: connect to host b port 22: No route to host"]
        with pytest.raises(UserError, match="hosts: b does not answer"):
            look([Host("b", 8)], False)


@pytest.mark.parametrize("key", ["name", "output"])
def test_a_restart_of_a_file_that_has_become_another_run_is_refused(tmp_path: Path, key: str) -> None:
    """It would train the other run under the lock and the records of this one."""
    run = tmp_path / "run.yaml"
    keys = {"name": "run", "output": str(tmp_path)}
    run.write_text(yaml.safe_dump(keys))
    config = load_config(run)
    run.write_text(yaml.safe_dump(keys | {key: str(tmp_path / "next") if key == "output" else "next"}))
    with StopSignals() as stop:
        look = look_at(LaunchedRun(str(run), (), config), print, print, stop)
        with pytest.raises(UserError, match=r"config: .*: the run is .*next.*, but this launch is of .*/run; rule: "):
            look([this_host(1)], False)
