"""Goodput over the launches of a run, read from the records that earlier launches left."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.host import process_seconds
from cosmos_scale.run.goodput import Goodput

NOW = 1_800_000_000.0


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is NOW, and this process has run for 5 s."""
    monkeypatch.setattr(time, "time", lambda: NOW)
    monkeypatch.setattr("cosmos_scale.run.goodput.process_seconds", lambda: 5.0)


def written(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def training(step: int, ended: float, *, useful: float | None = None, wall: float | None = None) -> dict[str, Any]:
    """A record whose steps took 2 s each, `ended` seconds before now."""
    record = {"kind": "train", "step": step, "time": NOW - ended, "step_seconds_max": 2.0}
    own = {"useful_seconds": useful, "wall_seconds": wall}
    return record | {key: value for key, value in own.items() if value is not None}


def test_a_new_run_counts_from_the_start_of_its_process(tmp_path: Path) -> None:
    goodput = Goodput(tmp_path / "metrics.jsonl", 0, anew=False)
    goodput.add(4.0)
    assert goodput.numbers() == {"useful_seconds": 4.0, "wall_seconds": 5.0, "goodput": 0.8}


def test_a_resumed_run_counts_from_its_first_start_and_not_what_it_takes_again(tmp_path: Path) -> None:
    """First start 100 s ago; 20 steps in 40 s, of which 6 are taken again: 14 counted, half-way between records."""
    records = [training(8, 70, useful=16.0, wall=30.0), training(20, 40, useful=40.0, wall=60.0)]
    path = written(tmp_path, records[0], {"kind": "eval", "step": 8, "time": NOW - 60}, records[1])
    numbers = Goodput(path, 14, anew=False).numbers()
    assert numbers == pytest.approx({"useful_seconds": 28.0, "wall_seconds": 100.0, "goodput": 0.28})


def test_steps_saved_behind_the_last_record_count_as_those_before(tmp_path: Path) -> None:
    path = written(tmp_path, training(8, 70, useful=16.0, wall=30.0), training(12, 60, useful=28.0, wall=40.0))
    assert Goodput(path, 14, anew=False).numbers()["useful_seconds"] == pytest.approx(28.0 + 2 * 3.0)


def test_steps_behind_the_last_record_count_by_the_stop_that_saved_them(tmp_path: Path) -> None:
    stop = {"kind": "stop", "step": 5, "time": NOW - 80, "reason": "SIGTERM", "useful_seconds": 9.0}
    path = written(tmp_path, stop | {"wall_seconds": 20.0})
    numbers = Goodput(path, 5, anew=False).numbers()
    assert numbers == pytest.approx({"useful_seconds": 9.0, "wall_seconds": 100.0, "goodput": 0.09})
    # A stop of an older version tells nothing of the time.
    written(tmp_path, {"kind": "stop", "step": 5, "time": NOW - 80, "reason": "SIGTERM"})
    assert Goodput(path, 5, anew=False).numbers()["useful_seconds"] == 0.0


def test_a_launch_that_left_no_checkpoint_counts_as_lost(tmp_path: Path) -> None:
    path = written(tmp_path, training(8, 70, useful=16.0, wall=30.0))
    assert Goodput(path, 0, anew=False).numbers() == {"useful_seconds": 0.0, "wall_seconds": 100.0, "goodput": 0.0}
    assert Goodput(path, 0, anew=True).numbers()["wall_seconds"] == 5.0


def test_records_of_older_versions_and_torn_lines_are_read(tmp_path: Path) -> None:
    """They have neither useful nor wall seconds: both come from the steps' own times."""
    path = written(tmp_path, training(10, 70), training(20, 40))
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 30, "ti')
    numbers = Goodput(path, 20, anew=False).numbers()
    assert numbers == pytest.approx({"useful_seconds": 40.0, "wall_seconds": 90.0, "goodput": 40 / 90})


@pytest.mark.parametrize("key", ["step", "time", "useful_seconds", "wall_seconds"])
@pytest.mark.parametrize("value", [None, "12", math.nan, 10**400], ids=["null", "text", "nan", "huge"])
def test_records_that_cannot_be_counted_with_count_as_torn(key: str, value: object, tmp_path: Path) -> None:
    """Other programs, which people let write the file anew, leave such values."""
    whole, other = training(8, 70, useful=16.0, wall=30.0), training(12, 60, useful=28.0, wall=40.0)
    expected = Goodput(written(tmp_path, whole), 8, anew=False).numbers()
    assert Goodput(written(tmp_path, whole, other | {key: value}), 8, anew=False).numbers() == expected


@pytest.mark.parametrize("day", [-86_400.0, 86_400.0])
def test_a_clock_that_is_set_while_a_run_goes_on_changes_nothing(
    day: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goodput = Goodput(tmp_path / "metrics.jsonl", 0, anew=False)
    goodput.add(4.0)
    monkeypatch.setattr(time, "time", lambda: NOW + day)
    assert goodput.numbers() == {"useful_seconds": 4.0, "wall_seconds": 5.0, "goodput": 0.8}
    # A launch that comes later: its records before the clock was set are those of another clock.
    path = written(
        tmp_path,
        training(8, 70, useful=16.0, wall=30.0),
        training(12, 60 - day, useful=24.0, wall=40.0),
    )
    assert Goodput(path, 12, anew=False).numbers()["wall_seconds"] == pytest.approx(100.0)


def test_a_clock_that_was_set_back_between_launches_leaves_what_the_records_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW - 86_400)
    path = written(tmp_path, training(8, 70, useful=16.0, wall=30.0))
    assert Goodput(path, 8, anew=False).numbers() == pytest.approx(
        {"useful_seconds": 16.0, "wall_seconds": 35.0, "goodput": 16 / 35}
    )
    path = written(tmp_path, training(10, 70))  # of an older version
    assert Goodput(path, 10, anew=False).numbers()["goodput"] == pytest.approx(20 / 25)


def test_a_process_knows_how_long_it_has_run() -> None:
    before = process_seconds()
    time.sleep(0.05)
    assert 0.04 <= process_seconds() - before < 60.0
    assert 0 < before < 24 * 3600
