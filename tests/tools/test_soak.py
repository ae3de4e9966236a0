"""The soak in its short form, and the comparison that it ends with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tools import soak
from tools.soak_parts.compare import compare_with_replay, compare_with_undisturbed, kept, world_sizes
from tools.soak_parts.events import KINDS, SAMPLE_DAMAGED
from tools.soak_parts.hosts import Hosts
from tools.soak_parts.setting import small_disk
from tools.soak_parts.watched import Step, WatchedRun

LOSSES = {step: 5.0 - 0.1 * step for step in range(1, 11)}


def taken(first: int, last: int, attempt: int, world_size: int = 2, off: float = 0.0) -> list[Step]:
    """The records of some steps, each with the undisturbed run's loss times 1 + off."""
    return [
        Step(step, LOSSES[step] * (1.0 + off), 100.0 * attempt + step, attempt, world_size)
        for step in range(first, last + 1)
    ]


def test_steps_that_are_taken_again_count_twice_and_stay_once() -> None:
    steps = [*taken(1, 6, 1), *taken(5, 10, 2)]
    found = compare_with_undisturbed(steps, LOSSES, 2)
    assert (found.exact, found.near, found.worst, found.wrong) == (12, 0, 0.0, [])
    assert [(step, record.attempt) for step, record in kept(steps).items()] == [
        *((step, 1) for step in range(1, 5)),
        *((step, 2) for step in range(5, 11)),
    ]
    assert world_sizes(kept(steps)) == [(2, 10)]


def test_only_records_with_another_number_of_ranks_in_their_past_may_differ_a_little() -> None:
    """Steps 5 and 6 of one rank are lost, so that steps 5 to 7 have seen two ranks alone; steps 8 to 10 have not."""
    steps = [
        *taken(1, 4, 1),
        *taken(5, 6, 2, world_size=1, off=1e-7),
        *taken(5, 7, 3),
        *taken(8, 9, 4, world_size=1, off=-2e-7),
        *taken(10, 10, 5, off=1e-6),
    ]
    found = compare_with_undisturbed(steps, LOSSES, 2)
    assert (found.exact, found.near, found.wrong) == (7, 5, [])
    assert found.worst == pytest.approx(1e-6, rel=1e-3)
    assert world_sizes(kept(steps)) == [(2, 7), (1, 9), (2, 10)]
    replay = {step: record.loss for step, record in kept(steps).items()}
    assert compare_with_replay(kept(steps), replay).wrong == []
    assert len(compare_with_replay(kept(steps), replay | {9: LOSSES[9]}).wrong) == 1


@pytest.mark.parametrize(
    ("steps", "wrong"),
    [
        ([*taken(1, 4, 1), *taken(5, 5, 2, off=1e-7)], "step 5 on 2 ranks (start 2): loss "),
        ([*taken(1, 4, 1), *taken(5, 5, 2, world_size=1, off=2e-5)], "step 5 on 1 ranks (start 2): loss "),
        ([*taken(1, 4, 1), *taken(6, 6, 2)], "step 6 was taken, and no step before it"),
    ],
    ids=["not bit for bit", "beyond the tolerance", "a step left out"],
)
def test_what_differs_is_found(steps: list[Step], wrong: str) -> None:
    (text,) = compare_with_undisturbed(steps, LOSSES, 2).wrong
    assert text.startswith(wrong)


def test_a_step_that_the_undisturbed_run_has_not_is_wrong() -> None:
    assert compare_with_undisturbed(taken(1, 2, 1), {1: LOSSES[1]}, 2).wrong == [
        f"step 2 on 2 ranks (start 1): loss {LOSSES[2]!r}, not None"
    ]


def test_records_that_a_resume_drops_are_kept_by_the_one_who_looks(tmp_path: Path) -> None:
    run = WatchedRun(tmp_path / "soak.yaml", tmp_path, Hosts(tmp_path / "hosts"), tmp_path)
    run.folder.mkdir()
    log, metrics = tmp_path / "launch-000.log", run.folder / "metrics.jsonl"
    starts = "cosmos-scale launch: {} on host-a (1); they meet at 127.0.0.1:1; output in /x\n"
    log.write_text(starts.format("2 ranks"))
    lines = [json.dumps({"kind": "train", "time": time, "step": time, "loss": 5.0}) + "\n" for time in (1, 2, 3)]
    metrics.write_text("".join(lines) + '{"kind": "train", "ti')  # a line that is written right now
    run.look()
    assert [step.step for step in run.steps] == [1, 2, 3]
    log.write_text(log.read_text() + starts.format("1 rank"))
    anew = metrics.with_name("new")
    anew.write_text(lines[0] + json.dumps({"kind": "train", "time": 9, "step": 2, "loss": 4.0}) + "\n")
    anew.rename(metrics)
    run.look()
    run.look()
    assert [(step.step, step.attempt, step.world_size) for step in run.steps] == [
        (1, 1, 2),
        (2, 1, 2),
        (3, 1, 2),
        (2, 2, 1),
    ]
    assert (run.attempts, run.last) == (2, 2)


def test_arguments_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        soak.main(["--help"])
    assert ended.value.code == 0
    assert "python tools/soak.py --minutes 3 --quick" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        soak.main(["--minutes", "0"])
    assert ended.value.code == 2
    assert "0 must be a number of minutes, more than 0" in capsys.readouterr().err


def test_a_folder_with_files_of_others_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert soak.main(["--minutes", "1", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} holds other files, which could be replaced or deleted" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert soak.main(["--minutes", "1", "--out", str(tmp_path / "thesis.txt")]) == 2
    assert "thesis.txt" in capsys.readouterr().err


def test_what_an_earlier_soak_left_is_deleted(tmp_path: Path) -> None:
    soak.make_empty(tmp_path / "new" / "out")
    (tmp_path / "new" / "out" / "launch-001.log").touch()
    soak.make_empty(tmp_path / "new" / "out")
    assert [file.name for file in (tmp_path / "new" / "out").iterdir()] == ["events.jsonl"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_short_soak_has_every_kind_of_event_and_the_losses_of_an_undisturbed_run(tmp_path: Path) -> None:
    with small_disk(tmp_path / "probe", 1) as no_disk:
        pass
    found = tmp_path / "soak.json"
    command = [sys.executable, str(REPOSITORY / "tools" / "soak.py"), "--minutes", "3", "--quick", "--seed", "3"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [*command, "--out", str(tmp_path / "out"), "--json", str(found)],
            stdout=said,
            stderr=said,
            cwd=tmp_path,
        )
        try:
            status = process.wait(1400)
        finally:  # SIGTERM: it unmounts its disk and ends what it has started
            process.terminate()
            process.wait(60)
    text = (tmp_path / "said").read_text()
    assert status == 0, text
    assert "passed" in text
    result = json.loads(found.read_text())
    assert {event["kind"] for event in result["events"]} == {SAMPLE_DAMAGED, *KINDS} - (
        {"disk full"} if no_disk else set()
    )
    assert {event["fault"] for event in result["events"]} == {None}
    undisturbed, same_sizes = result["comparisons"].values()
    assert undisturbed["exact"] + undisturbed["near"] >= result["steps"]
    assert undisturbed["exact"] > 0
    assert undisturbed["near"] > 0
    assert same_sizes["exact"] == result["steps"]
    assert len((tmp_path / "out" / "events.jsonl").read_text().splitlines()) == len(result["events"])
    assert not os.path.ismount(tmp_path / "out" / "disk")
