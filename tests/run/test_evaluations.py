"""Evaluations in whole runs: each evaluator at its own steps, failures told and tried again, runs of the old form."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from cosmos_scale.cli.main import main
from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.errors import UserError
from cosmos_scale.run.evaluations import Evaluations
from cosmos_scale.run.explain import explain
from cosmos_scale.testing.runs import Finished, records, train_to_end, write_run
from cosmos_scale.testing.shard_files import write_shards
from tests.checkpoint.edit import content_of, rewrite
from tests.evaluation.measured import retrieval_of
from tests.run.dying_train import DIED, STEP
from tests.run.failing_train import SHARD

MODELS: tuple[Literal["student", "teacher"], ...] = ("student", "teacher")


class Failing(NamedTuple):
    """A run of eight steps in which the evaluations of steps 4 and 8 fail, on the last rank only."""

    run: Path
    gallery: Path
    ranks: int
    finished: Finished


@pytest.fixture(scope="module", params=[1, 2])
def failing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, scenes: SceneShards) -> Failing:
    ranks: int = request.param
    folder = tmp_path_factory.mktemp(f"failing{ranks}")
    gallery = write_shards(folder / "gallery", [5, 6])  # the second shard is the last rank's
    other = {"kind": "retrieval", "name": "other", "every": 3, "shards": str(scenes.gallery), "max_samples": 10}
    run = write_run(
        folder,
        scenes,
        zero={"stage": 1},
        checkpoint={"every": 2, "keep_last": 9},
        data={"remote": {"retries": 1, "backoff_s": 0.01}},
        eval=[{"kind": "retrieval", "every": 2, "shards": str(gallery), "batch": 4}, other],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SHARD, str(gallery / "00001.tar"))
        finished = train_to_end(run, ranks=ranks, program="tests.run.failing_train").require(0)
    return Failing(run, gallery, ranks, finished)


def test_a_failing_evaluation_is_told_and_counted_and_the_run_goes_on(failing: Failing) -> None:
    assert [record["step"] for record in records(failing.run)] == list(range(1, 9))
    where = " (rank 1)" if failing.ranks == 2 else ""
    shard = f"{failing.gallery}/00001.tar: shard of source retrieval"
    told = [line for line in failing.finished.output.splitlines() if "evaluation retrieval failed, " in line]
    assert told == [
        "step 4: evaluation retrieval failed, 1 so far, and the run goes on: "
        f"{shard} cannot be opened any more: No such file or directory{where}",
        f"step 8: evaluation retrieval failed, 2 so far, and the run goes on: ZeroDivisionError: a text broke{where}",
    ]
    failures = records(failing.run, kind="eval_failed")
    counted = [
        {key: value for key, value in record.items() if key not in ("kind", "evaluator", "time")} for record in failures
    ]
    of_retrieval = [{"step": 4, "retrieval/failures": 1}, {"step": 8, "retrieval/failures": 2}]
    assert counted == [*of_retrieval, {"step": 8, "other/failures": 1}]  # the last step counts for every evaluator
    assert "in texts" in failing.finished.output + failing.finished.errors  # the traceback of the program's error


def test_evaluators_run_at_their_own_steps_and_say_what_the_command_says(failing: Failing, scenes: SceneShards) -> None:
    found = records(failing.run, kind="eval")
    of_retrieval = {record["step"]: record for record in found if "student/images" in record}
    of_other = {record["step"]: record for record in found if "other/student/images" in record}
    assert len(found) == len(of_retrieval) + len(of_other)
    assert (list(of_retrieval), list(of_other)) == ([2, 6], [3, 6])  # at step 8 both fail
    assert of_other[6]["other/teacher/images"] == 10
    for step, record in of_retrieval.items():
        checkpoint = failing.run.parent / "tiny" / "checkpoints" / f"step-{step:08d}"
        for which in MODELS:
            alone = retrieval_of(checkpoint, failing.gallery, which)
            assert alone["images"] == 11
            assert {key: record[f"{which}/{key}"] for key in alone} == pytest.approx(alone)


def test_a_step_is_saved_before_it_is_evaluated(tmp_path: Path, scenes: SceneShards) -> None:
    """A process that dies in the evaluation of a step leaves this step's checkpoint, at the run's last step too."""
    evaluator = {"kind": "retrieval", "every": 2, "shards": str(scenes.gallery), "max_samples": 4}
    run = write_run(tmp_path, scenes, checkpoint={"every": 2}, eval=[evaluator])
    folder = tmp_path / "tiny" / "checkpoints"
    for last_step, steps in (("8", [2]), ("3", [2, 3])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(STEP, str(steps[-1]))
            train_to_end(run, f"train.max_steps={last_step}", program="tests.run.dying_train").require(DIED)
        assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in steps]
        assert [record["step"] for record in records(run)] == list(range(1, steps[-1] + 1))
    # Each step once; that of step 2 by the launch after the one that died in it. Step 3 is no last step any more.
    for last_step, evaluated in (("5", [2, 4, 5]), ("6", [2, 4, 5, 6]), ("6", [2, 4, 5, 6])):
        train_to_end(run, f"train.max_steps={last_step}").require(0)
        assert [record["step"] for record in records(run, kind="eval")] == evaluated


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2)])
def test_an_evaluation_that_was_cut_off_is_measured_by_the_next_launch(
    tmp_path: Path, scenes: SceneShards, ranks: int, stage: int
) -> None:
    """At the run's last step, when nothing else is left to do: with the numbers of a run that was not cut off."""
    section = {"kind": "retrieval", "every": 2, "shards": str(scenes.gallery), "max_samples": 16}
    run = write_run(tmp_path, scenes, eval=[section, {**section, "name": "again"}], zero={"stage": stage})
    train_to_end(run, "train.max_steps=4", "name=whole", ranks=ranks).require(0)
    train_to_end(run, "train.max_steps=4", ranks=ranks).require(0)
    path = tmp_path / "tiny" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["again/student/images"] == 16
    for missing in (1, 2, 0):  # the second evaluator's record of step 4, both records, none
        path.write_text("".join(lines[: len(lines) - missing]))
        train_to_end(run, "train.max_steps=4", ranks=ranks).require(0)
        found, expected = (
            [{**record, "time": 0} for record in records(run, name, kind="eval")] for name in ("tiny", "whole")
        )
        assert found == expected
    path.write_text("".join([*lines[:-2], lines[-1]]))  # the first evaluator's, as if it had been added since
    train_to_end(run, "train.max_steps=4", ranks=ranks).require(0)
    evaluated = [record["evaluator"] for record in records(run, kind="eval") if record["step"] == 4]
    assert evaluated == ["again", "retrieval"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_command_tries_a_failed_last_evaluation_again_and_no_other(
    tmp_path: Path, scenes: SceneShards, ranks: int
) -> None:
    """Its gallery is away while the run ends, and comes back: what was measured is not measured again."""
    gallery, away = write_shards(tmp_path / "gallery", [4]), tmp_path / "away"
    sections = [{"kind": "retrieval", "every": 9, "shards": str(shards)} for shards in (scenes.gallery, gallery)]
    sections[0] |= {"name": "sound", "max_samples": 4}
    run = write_run(tmp_path, scenes, eval=sections, zero={"stage": 1})
    train_to_end(run, "train.max_steps=1", "eval=[]", ranks=ranks).require(0)
    gallery.rename(away)  # a run that resumes goes on without it
    train_to_end(run, "train.max_steps=2", ranks=ranks).require(0)
    assert len(records(run, kind="eval_failed")) == 1
    again = "step 2: evaluation retrieval failed in an earlier launch, and is tried again"
    finished = train_to_end(run, "train.max_steps=2", ranks=ranks).require(0)
    assert finished.output.splitlines().count(again) == 1
    assert len(records(run, kind="eval_failed")) == 2
    away.rename(gallery)
    finished = train_to_end(run, "train.max_steps=2", ranks=ranks).require(0)
    assert finished.output.splitlines().count(again) == 1
    finished = train_to_end(run, "train.max_steps=2", ranks=ranks).require(0)
    assert "tried again" not in finished.output
    evaluated = [(record["step"], record["evaluator"]) for record in records(run, kind="eval")]
    assert evaluated == [(2, "sound"), (2, "retrieval")]
    assert len(records(run, kind="eval_failed")) == 2


def test_runs_that_wrote_the_old_form_resume(failing: Failing, tmp_path: Path) -> None:
    checkpoint = tmp_path / "tiny" / "checkpoints" / "step-00000004"
    shutil.copytree(failing.run.parent / "tiny" / "checkpoints" / "step-00000004", checkpoint)
    content = content_of(checkpoint)
    first, _ = content["state"]["config"]["eval"]
    old = {key: first[key] for key in ("shards", "index", "captions", "max_samples", "batch")}
    content["state"]["config"]["eval"] = {"every": first["every"], "retrieval": old}
    rewrite(checkpoint, content)
    overrides = [f"output={tmp_path}", "train.max_steps=6", "eval=[]", "eval.every=1"]
    resumed = train_to_end(failing.run, *overrides, f"eval.retrieval.shards={failing.gallery}").require(0)
    assert f"resumed from {checkpoint}" in resumed.output
    evaluations = records(tmp_path / "run.yaml", kind="eval")
    assert [record["step"] for record in evaluations] == [4, 5, 6]  # step 4 is due now, and has no record here
    assert evaluations[-1]["teacher/images"] == 11


def config(tmp_path: Path, scenes: SceneShards, *evaluators: dict[str, Any]) -> RunConfig:
    return load_config(write_run(tmp_path, scenes, eval=list(evaluators)))


def test_what_is_wrong_with_an_evaluator_is_the_users_error_at_the_start(tmp_path: Path, scenes: SceneShards) -> None:
    wrong = {"kind": "retrieval", "name": "held", "shards": str(scenes.gallery), "captions": "captoin"}
    with pytest.raises(UserError, match=r"^eval\.held: .*no captions under 'captoin'"):
        Evaluations(config(tmp_path, scenes, {**wrong, "every": 1}), start_ranks("cpu"), tmp_path)
    # What never runs is not looked for.
    assert not Evaluations(config(tmp_path, scenes, wrong), start_ranks("cpu"), tmp_path).due(1)


def test_the_dry_run_names_every_evaluator_that_runs(
    tmp_path: Path, scenes: SceneShards, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluators: list[dict[str, Any]] = [
        {"kind": "retrieval", "every": 2000, "shards": "https://me:secret@host/{0..9}.tar"},
        {"kind": "retrieval", "name": "held", "every": 3, "shards": "b"},
        {"kind": "retrieval", "name": "never", "shards": "c"},
    ]
    explain(config(tmp_path, scenes, *evaluators), 1)
    printed = re.sub(r"\n {20,}", " ", capsys.readouterr().out)  # a long row goes on in the next line
    rows = [line.split(maxsplit=1)[1] for line in printed.splitlines() if "  evaluates " in line]
    assert rows == ["retrieval on https://***@host/{0..9}.tar every 2,000 steps", "held: retrieval on b every 3 steps"]


def test_a_table_that_cannot_be_made_fails_the_evaluation_and_no_more(
    tmp_path: Path, scenes: SceneShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_table(*_: object) -> None:
        raise KeyError("a number")

    monkeypatch.setattr("cosmos_scale.evaluation.retrieval.Retrieval.table", break_table)
    evaluator = {"kind": "retrieval", "every": 1, "shards": str(scenes.gallery), "max_samples": 4}
    run = write_run(tmp_path, scenes, eval=[evaluator], train={"global_batch": 8, "schedule_steps": 8, "max_steps": 1})
    assert main(["train", str(run)]) == 0
    failed = records(run, kind="eval_failed")
    assert [(record["step"], record["retrieval/failures"]) for record in failed] == [(1, 1)]


def test_a_run_resumes_without_its_gallery_and_measures_when_the_gallery_is_back(
    tmp_path: Path, scenes: SceneShards, capsys: pytest.CaptureFixture[str]
) -> None:
    gallery, away = tmp_path / "gallery", tmp_path / "away"
    write_shards(gallery, [4])
    run = write_run(tmp_path, scenes, eval=[{"kind": "retrieval", "every": 1, "shards": str(gallery)}])
    assert main(["train", str(run), "train.max_steps=1"]) == 0
    gallery.rename(away)
    assert main(["train", str(run), "train.max_steps=2"]) == 0
    said = capsys.readouterr()
    assert "rank 0: eval.retrieval: cannot be opened now, the next try is its next evaluation: data source" in said.err
    assert "step 2: evaluation retrieval failed, 1 so far, and the run goes on: data source retrieval" in said.out
    away.rename(gallery)
    assert main(["train", str(run), "train.max_steps=3"]) == 0
    assert [record["step"] for record in records(run, kind="eval")] == [1, 3]
    settings = load_config(run, [])
    away = gallery.rename(away)
    evaluations = Evaluations(settings, start_ranks("cpu"), tmp_path, resumed=True)
    with pytest.raises(UserError, match=r"^eval\.retrieval: "):
        Evaluations(settings, start_ranks("cpu"), tmp_path)
    away.rename(gallery)
    assert evaluations.due(1)
