"""What is read of a run's folder, however little or broken it is."""

import json
import os
import time
from pathlib import Path

import pytest

from cosmos_scale.errors import UserError
from cosmos_scale.report.code import note_on_code
from cosmos_scale.report.head import head_of
from cosmos_scale.report.records import RunRecords, number_of, read_runs
from cosmos_scale.report.series import Point, curve_of, rank_seconds, skipped_steps, thinned, training_seconds
from cosmos_scale.report.timeline import events_of, shortened
from tests.report.run_folders import (
    BATCH,
    BEGAN,
    STEP_SECONDS,
    evaluation_record,
    start_record,
    train_record,
    write_run,
)


def only(folder: Path) -> RunRecords:
    (run,) = read_runs([folder])
    return run


def test_a_whole_run_is_read(tmp_path: Path) -> None:
    records = [start_record(0, 4), *(train_record(step) for step in range(10, 201, 10)), evaluation_record(200, 0.5)]
    run = only(write_run(tmp_path / "run", records))
    assert (run.label, run.last_step, run.last_planned_step, run.global_batch) == ("some_run", 200, 200, BATCH)
    assert (len(run.train), len(run.evaluations), len(run.starts), run.world_size) == (20, 1, 1, 4)
    assert run.notes == []
    head = head_of(run)
    assert head.tone == "good"
    assert head.verdict.startswith("Finished: all 200 steps")
    assert "R@1, image to text 50.0 % (50 x chance), student" in head.verdict
    assert ("GPU-hours in steps", f"{4 * 200 * STEP_SECONDS / 3600:,.2f}") in head.facts


def test_a_torn_line_costs_that_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [train_record(10), train_record(20)])
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + json.dumps(train_record(30)).encode()[:50])
    run = only(folder)
    assert [record["step"] for record in run.train] == [10, 20]
    assert run.notes == ["metrics.jsonl: 1 line torn or not understood, left out."]


def test_lines_that_are_no_records_cost_nothing_else(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [train_record(10, loss="low", lr=True, scale=[1], clip=float("nan"))])
    path = folder / "metrics.jsonl"
    path.write_bytes(b'3\nnull\n[]\n{}\n{"kind": 1, "step": 1}\n\xff\xfe\n' + path.read_bytes() + b"[" * 100_000)
    run = only(folder)
    assert run.notes == ["metrics.jsonl: 7 lines torn or not understood, left out."]
    (record,) = run.train
    assert [number_of(record, key) for key in ("loss", "lr", "scale", "clip", "none")] == [None] * 5


@pytest.mark.parametrize("missing", ["metrics.jsonl", "config.yaml"])
def test_a_missing_file_is_said(tmp_path: Path, missing: str) -> None:
    folder = write_run(tmp_path / "run", [train_record(10)])
    (folder / missing).unlink()
    (note,) = only(folder).notes
    assert note.startswith(f"{missing} is not there")
    assert head_of(only(folder)).facts[0] == ("folder", str(folder.resolve()))


def test_empty_records_are_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [])
    (folder / "damaged.jsonl").write_text("")
    assert only(folder).notes == ["metrics.jsonl is empty, so that there are no curves."]
    (folder / "metrics.jsonl").write_text('{"torn": ')
    assert only(folder).notes == ["metrics.jsonl: 1 line torn or not understood, left out."]


def test_a_config_of_other_code_keeps_the_curves(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [train_record(10)])
    with open(folder / "config.yaml", "a") as file:
        file.write("key_of_the_future: 1\n")
    run = only(folder)
    assert run.config is None
    assert run.tree["key_of_the_future"] == 1
    assert (run.label, run.global_batch, len(run.train)) == ("some_run", BATCH, 1)
    assert "of another version" in run.notes[0]


def test_folders_that_are_no_run_are_refused_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    saved = tmp_path / "runs" / "a" / "checkpoints" / "step-00000002"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text("{}")
    refusals = [("empty", "no run"), ("file", "is not a folder"), ("none", "no such folder")]
    for name, said in (*refusals, ("runs", r"no run; rule: .*: a \(1 checkpoint, the newest step-00000002\)$")):
        with pytest.raises(UserError, match=said) as refused:
            read_runs([tmp_path / name])
        assert "\n" not in str(refused.value)


def test_a_run_under_way_and_a_run_that_died_are_told_apart(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [train_record(step) for step in (10, 20)])
    assert head_of(only(folder)).verdict.startswith("Stopped at step 20 of 200")
    lock = folder / "launch.lock"
    lock.write_text("{}")
    head = head_of(only(folder))
    assert head.tone == "running"
    assert head.verdict.startswith("In progress at step 20 of 200, about 6.0 min left")
    for off in (-3600, 3600):  # ahead: the clock was set back since
        os.utime(lock, (time.time() + off,) * 2)
        assert head_of(only(folder)).verdict.startswith("Died at step 20 of 200")
    lock.write_text("")  # as a launch leaves it
    assert head_of(only(folder)).tone == "warning"


def test_a_step_that_was_taken_twice_counts_once(tmp_path: Path) -> None:
    run = only(write_run(tmp_path / "run", [train_record(10), train_record(20), train_record(10, loss=9.0)]))
    assert [record["step"] for record in run.train] == [10, 20]
    assert run.train[0]["loss"] == 9.0


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, [train_record(10)]) for name in ("a", "b")]
    assert [run.label for run in read_runs(folders)] == [str(folder) for folder in folders]


def test_a_thinned_curve_keeps_spikes_and_ends() -> None:
    values = [1.0] * 10_000
    values[1234], values[7777] = 99.0, -99.0
    points = [Point(step, step / 10, value) for step, value in enumerate(values)]
    kept = thinned(points, 300)
    assert len(kept) <= 300
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert {99.0, -99.0} <= {point.value for point in kept}
    assert [point.step for point in kept] == sorted(point.step for point in kept)
    assert thinned(points[:300], 300) == points[:300]


def test_hours_count_from_the_first_start(tmp_path: Path) -> None:
    with_start = only(write_run(tmp_path / "a", [start_record(0, 2), train_record(1800)]))
    without = only(write_run(tmp_path / "b", [train_record(1800)]))
    for run in (with_start, without):
        curve = curve_of(run, run.train, "loss", "loss", 10)
        assert curve.points[0].hours == pytest.approx(1800 * STEP_SECONDS / 3600)


def test_time_of_ranks_follows_the_number_of_ranks(tmp_path: Path) -> None:
    records = [start_record(0, 4), *map(train_record, (10, 20)), start_record(20, 2), train_record(30)]
    run = only(write_run(tmp_path / "run", records))
    assert training_seconds(run) == 30 * STEP_SECONDS
    assert rank_seconds(run) == (4 * 20 + 2 * 10) * STEP_SECONDS


def test_events_tell_what_happened(tmp_path: Path) -> None:
    records = [
        start_record(0, 2),
        train_record(10),
        start_record(10, 4),
        train_record(20, loss=None, skipped_steps=1),
        train_record(30, skipped_steps=1),
        evaluation_record(30, 0.25),
        {"kind": "stop", "time": BEGAN + 100, "step": 40, "reason": "SIGTERM at rank 1"},
        {"kind": "eval_failed", "time": BEGAN, "step": 40, "evaluator": "voc", "voc/failures": 1},
    ]
    folder = write_run(tmp_path / "run", records)
    damages = [
        {"step": 12, "sample": 3, "shard": "a.tar", "key": "x", "reason": "no JPEG"},
        {"step": 12, "sample": 4, "shard": "a.tar", "key": "y", "reason": "no JPEG"},
        {"step": 25, "sample": None, "shard": "b.tar", "key": None, "reason": "lost: not there"},
    ]
    (folder / "damaged.jsonl").write_text("".join(json.dumps(damage) + "\n" for damage in damages))
    run = only(folder)
    assert skipped_steps(run) == [20]
    assert [(event.step, event.kind) for event in events_of(run)] == [
        (0, "start"),
        (10, "resume"),
        (12, "damaged samples"),
        (20, "skipped step"),
        (25, "lost shard"),
        (30, "evaluation"),
        (40, "evaluation failed"),
        (40, "stop"),
    ]
    said = {event.kind: event.said for event in events_of(run)}
    assert said["stop"] == "asked for by SIGTERM at rank 1"
    assert said["resume"] == "4 ranks, cuda"
    assert said["damaged samples"] == "2 samples replaced: no JPEG"
    assert said["evaluation"].startswith("retrieval: R@1, image to text: student 25.0 %, teacher 12.5 %")


def test_the_code_of_each_launch_is_told(tmp_path: Path) -> None:
    first = {"version": "0.1.0", "sources": "aaaa", "commit": "0123456789abcdef", "modified": True}
    other = {"version": "0.1.0", "sources": "bbbb"}
    same = write_run(tmp_path / "same", [start_record(0, 2) | first, start_record(10, 2) | first])
    said = "cosmos-scale 0.1.0, commit 0123456789ab with changes, sources aaaa"
    assert ("code", said) in head_of(only(same)).facts
    assert note_on_code(only(same)) == ""
    assert [event.said for event in events_of(only(same))] == [f"2 ranks, cuda; {said}", "2 ranks, cuda"]
    records = [start_record(0, 2), start_record(10, 2) | first, start_record(20, 2) | other]
    changed = only(write_run(tmp_path / "changed", records))
    assert ("code", "cosmos-scale 0.1.0, sources bbbb") in head_of(changed).facts
    assert note_on_code(changed) == (
        f"its launches ran different code: after step 0: not recorded; after step 10: {said}; "
        "after step 20: cosmos-scale 0.1.0, sources bbbb."
    )


def test_older_records_without_starts_show_pauses(tmp_path: Path) -> None:
    later = train_record(30, time=BEGAN + 30 * STEP_SECONDS + 7200)
    run = only(write_run(tmp_path / "run", [train_record(10), train_record(20), later]))
    (pause,) = [event for event in events_of(run) if event.kind == "pause"]
    assert pause.step == 20
    assert pause.said.startswith("120.0 minutes")


def test_of_many_events_the_first_and_the_last_are_shown(tmp_path: Path) -> None:
    run = only(write_run(tmp_path / "run", [evaluation_record(step, 0.1) for step in range(1, 1001)]))
    shown, left_out = shortened(events_of(run))
    assert len(shown) + left_out == 1000
    assert (shown[0].step, shown[-1].step) == (1, 1000)
