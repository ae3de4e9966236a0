"""Classification during training: on both models, shared by all ranks, with files, and the watchdog told of it."""

from pathlib import Path

import pytest

from cosmos_scale.cli.main import main
from cosmos_scale.config import ClassificationConfig
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.engine.contact import Contact
from cosmos_scale.evaluation.evaluator import measure
from cosmos_scale.evaluation.kinds import make_evaluator
from cosmos_scale.evaluation.loading import load_encoder
from cosmos_scale.run.evaluations import Evaluations
from cosmos_scale.run.metrics import MetricLog
from cosmos_scale.run.watchdog import Watchdog
from cosmos_scale.testing.runs import last_checkpoint, records, train_to_end, write_run
from tests.evaluation.labelled import write_folders

NOT_A_JPEG = "left out: cat/broken.jpg: the picture is not a JPEG"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_measures_what_the_command_measures(tmp_path: Path, scenes: SceneShards, ranks: int) -> None:
    pictures = write_folders(tmp_path / "pictures", [5, 6, 4])
    (pictures / "cat" / "broken.jpg").write_bytes(b"no picture")
    keys = {"kind": "classification", "data": str(pictures), "batch": 4, "confusions": 2}
    evaluators = [{**keys, "every": 3}, {**keys, "name": "again", "every": 4, "confusions": 0}]
    run = write_run(tmp_path, scenes, eval=evaluators, zero={"stage": 1})
    finished = train_to_end(run, "train.max_steps=4", ranks=ranks).require(0)
    found = records(run, kind="eval")
    assert [record["step"] for record in found] == [3, 4, 4]
    first = found[1]
    for which in ("student", "teacher"):
        encoder = load_encoder(last_checkpoint(run), which, "cpu")
        numbers = measure(make_evaluator(ClassificationConfig.model_validate(keys), encoder.setting), encoder)
        assert (numbers["pictures"], numbers["pictures_left_out"]) == (15, 1)
        assert {name: first[f"{which}/{name}"] for name in numbers} == numbers
        assert {name: found[2][f"again/{which}/{name}"] for name in numbers} == numbers
        folder = tmp_path / "tiny" / "evaluation" / "classification" / "step-00000004" / which
        assert sorted(path.name for path in folder.iterdir()) == ["confusions.csv", "confusions.png"]
    # Once an evaluator, though it is read for two models, and at two steps.
    left_out = [line for line in finished.errors.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == 2
    for line in left_out:
        assert line.startswith(("left out: cat/broken.jpg: the picture does not decode", NOT_A_JPEG))


def test_long_evaluations_tell_the_watchdog_that_they_go_on(tmp_path: Path) -> None:
    watchdog = Watchdog(0.0, tmp_path, Contact(0, {}), list)
    with watchdog.longer("the evaluation of step 3") as goes_on:
        before = watchdog._phase
        goes_on()
        assert watchdog._phase == before._replace(number=before.number + 1)
    assert watchdog._phase.what == "what follows the evaluation of step 3"


def test_reports_of_evaluators_reach_the_watchdog_and_the_bar(
    tmp_path: Path, scenes: SceneShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = write_folders(tmp_path / "pictures", [3, 2])
    keys = {"kind": "classification", "data": str(pictures), "batch": 2, "every": 1}
    run = write_run(tmp_path, scenes, eval=[keys])
    shown: list[tuple[str, int, int]] = []
    went_on: list[int] = []
    report = Evaluations._report

    def counted_report(self: Evaluations, *work: object) -> None:
        went_on.append(1)
        report(self, *work)  # type: ignore[arg-type]

    monkeypatch.setattr(MetricLog, "working", lambda self, work, done, total: shown.append((work, done, total)))
    monkeypatch.setattr(Evaluations, "_report", counted_report)
    assert main(["train", str(run), "train.max_steps=1"]) == 0
    pictures_of_a_model = [(2, 5), (4, 5), (5, 5)]
    assert [work[1:] for work in shown if work[0] == "classification: pictures"] == 2 * pictures_of_a_model
    assert len(went_on) == len(shown)
