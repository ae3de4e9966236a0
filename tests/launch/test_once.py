"""A program that all ranks run once, such as a profile: a stop is named, and has a status of its own."""

import os
import signal
from typing import Any

import pytest

from cosmos_scale.config.load import make_config
from cosmos_scale.exit_status import FAILED, STOPPED
from cosmos_scale.launch import once
from cosmos_scale.launch.attempt import Outcome, RankFailure
from cosmos_scale.launch.hostfile import Host
from cosmos_scale.launch.supervise import LaunchedRun, Meeting

HOST = Host("a", 1)


@pytest.mark.parametrize(
    ("asked", "status", "returned"),
    [(True, -signal.SIGTERM, STOPPED), (True, 2, 2), (False, -signal.SIGTERM, FAILED), (False, 2, 2)],
)
def test_ranks_that_a_stop_ends_are_no_failure(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], asked: bool, status: int, returned: int
) -> None:
    def attempt(*_: Any) -> Outcome:
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
        return Outcome(failure=RankFailure("a", 0, status, ""))

    meeting = Meeting([HOST], "127.0.0.1", 29500, {"a": {}})
    monkeypatch.setattr(once, "look_at", lambda *_: lambda *_: meeting)
    monkeypatch.setattr(once, "one_attempt", attempt)
    run = LaunchedRun("run.yaml", (), make_config({"name": "tiny", "output": "runs"}))
    assert once.launch_once(run, [HOST], "cosmos-scale profile") == returned
    said = "cosmos-scale profile: stopped by SIGTERM before its end; nothing was written"
    assert (said in capfd.readouterr().err) == (returned == STOPPED)
