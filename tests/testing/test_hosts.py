"""Hosts of namespaces: they reach each other, a plug can be pulled, and nothing of them is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cosmos_scale.testing.hosts import HostProgram, NamespaceHost, hosts_missing, namespace_hosts

SECONDS = 20.0
MAKER = """
import sys, time
from pathlib import Path
from cosmos_scale.testing.hosts import namespace_hosts
with namespace_hosts(Path(sys.argv[1]), ("a", "b")) as hosts:
    print("ready", flush=True)
    if sys.argv[2] == "stay":
        time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _needs_hosts() -> None:
    missing = hosts_missing()
    if missing is not None:
        pytest.skip(missing)


def test_hosts_reach_each_other_until_one_is_cut_off(tmp_path: Path) -> None:
    here = os.uname().nodename, Path("/dev/shm/of-host-b").exists()
    with namespace_hosts(tmp_path / "hosts", ("a", "b")) as (a, b):

        def asked(command: str, seconds: str = "10") -> HostProgram:
            program = a.start(["ssh", "-o", f"ConnectTimeout={seconds}", "b", command], tmp_path, tmp_path)
            program.wait(SECONDS)
            return program

        assert asked("hostname; ls /dev/shm; touch /dev/shm/of-host-b").output == "b\n"
        assert asked("ls /dev/shm").output == "of-host-b\n"
        (tmp_path / "shared").write_text("both\n")
        (tmp_path / "own").write_text("mine\n")
        with b.own_file(tmp_path / "shared", tmp_path / "own"):
            assert asked(f"cat {tmp_path}/shared").output == "mine\n"
        assert asked(f"cat {tmp_path}/shared").output == "both\n"
        b.cut()
        assert "timed out" in asked("true", seconds="1").errors
        b.plug()
        assert asked("false").wait(SECONDS) == 1
        b.lose_power()
        b.boot()
        assert asked("ls /dev/shm").output == ""
        _require_programs_end(a, tmp_path)
    assert here == (os.uname().nodename, Path("/dev/shm/of-host-b").exists())


def _require_programs_end(host: NamespaceHost, folder: Path) -> None:
    sleeper = host.start(["sleep", "60"], folder, folder)
    _wait_until(lambda: "sleep 60" in host.processes().values())
    host.end_programs()
    assert sleeper.wait(SECONDS) == -signal.SIGKILL
    assert host.processes() == {}


@pytest.mark.parametrize("end", ["killed", "interrupted", "left"])
def test_nothing_is_left_of_hosts(tmp_path: Path, end: str) -> None:
    """However the program ends that made them."""
    folder = tmp_path / "hosts"
    command = [sys.executable, "-c", MAKER, str(folder), "leave" if end == "left" else "stay"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == b"ready\n"
        if end == "killed":
            maker.kill()
        elif end == "interrupted":
            maker.send_signal(signal.SIGINT)
        maker.wait(SECONDS)
    _wait_until(lambda: not _servers(folder))


def _servers(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command:
            found.append(command)
    return found


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
