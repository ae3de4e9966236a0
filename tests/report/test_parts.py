"""Parts of the report in numbers and words."""

from pathlib import Path

import pytest

from cosmos_scale.evaluation.all_sets import PublicPlace
from cosmos_scale.evaluation.comparison import Measured, Results
from cosmos_scale.evaluation.published import PublishedRow
from cosmos_scale.report.evaluation_part import evaluator_tables, of_all_sets
from cosmos_scale.report.figures import in_few_signs
from cosmos_scale.report.final_numbers import final_numbers
from cosmos_scale.report.records import read_runs
from cosmos_scale.report.settings import ABSENT, between_runs, from_base
from tests.report.run_folders import evaluation_record, train_record, write_run

COCO = {"kind": "retrieval", "dataset": "coco_val2017", "data": "/data/coco"}


def test_numbers_of_a_published_run_stand_beside_the_published_ones(tmp_path: Path) -> None:
    records = [evaluation_record(100, 0.2), evaluation_record(200, 0.5)]
    (run,) = read_runs([write_run(tmp_path / "run", records, name="cc3m_vitb16", eval=[COCO])])
    (table,) = evaluator_tables(run)
    assert (table.name, table.step, table.models, table.compared) == ("retrieval", 200, ["student", "teacher"], True)
    rows = {row.name: (row.values, row.published) for row in table.rows}
    # COSMOS's README: COCO 53.1 % image to text, 40.1 % text to image.
    assert rows["image_to_text_R@1"] == (["50.00 %", "25.00 %"], "53.1 %")
    assert rows["text_to_image_R@1"] == (["50.00 %", "25.00 %"], "40.1 %")
    assert rows["chance_R@1"] == (["1.00 %", ""], "")
    assert table.caveats


def test_numbers_on_other_data_stand_alone(tmp_path: Path) -> None:
    shards = {"kind": "retrieval", "shards": "/data/held_out"}
    (run,) = read_runs([write_run(tmp_path / "run", [evaluation_record(9, 0.5)], name="cc3m_vitb16", eval=[shards])])
    (table,) = evaluator_tables(run)
    assert not table.compared


def test_differences_name_keys_and_both_values(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", [train_record(10)], name="first", seed=1)
    second = write_run(tmp_path / "second", [train_record(10)], name="second", eval=[COCO])
    runs = read_runs([first, second])
    base = from_base(runs[0])
    assert base is not None
    assert base.columns == ["defaults", "first"]
    assert dict(base.rows)["seed"] == ["0", "1"]
    assert set(dict(base.rows)) == {
        "name",
        "seed",
        "train.global_batch",
        "train.schedule_steps",
        "optimizer.warmup_steps",
    }
    between = between_runs(runs)
    assert between is not None
    rows = dict(between.rows)
    assert (rows["seed"], rows["name"], rows["eval.0.dataset"]) == (
        ["1", "0"],
        ["first", "second"],
        [ABSENT, "coco_val2017"],
    )
    assert between_runs(runs[:1]) is None


def test_last_numbers_of_runs_stand_side_by_side(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", [train_record(10, loss=2.0), evaluation_record(10, 0.5)], name="a")
    second = write_run(tmp_path / "b", [train_record(step, loss=3.0, mfu=0.3) for step in (10, 20)], name="b")
    table = final_numbers(read_runs([first, second]))
    assert table is not None
    rows = {row[0]: list(row[1:]) for row in table.rows}
    assert rows["step"] == ["10", "20"]
    assert rows["loss"] == ["2", "3"]
    assert rows["MFU, median"] == ["", "30.0 %"]
    assert rows["retrieval: R@1, image to text, teacher"] == ["25.00 %", ""]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0"), (0.98, "0.98"), (999.0, "999"), (5000.0, "5k"), (2e7, "20M"), (-3e9, "-3G")]
)
def test_axes_have_short_numbers(value: float, shown: str) -> None:
    assert in_few_signs(value) == shown


def test_all_public_sets_stand_beside_published_numbers(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run", [train_record(10)])])
    notes: list[str] = []
    assert of_all_sets(run, notes) == []
    place = PublicPlace("classification", "imagenet", (), (), "")
    numbers = {"pictures": 50_000, "top1": 0.351, "top5": 0.6, "mean_per_class": 0.3, "chance_top1": 0.001}
    measured = [Measured(place, "student", {}, numbers)]
    row = PublishedRow({("imagenet", "top1"): 37.1}, ["A caveat."])
    Results("step-8", "/data", "published", "a_row", row, measured).write(run.folder / "evaluation")
    (table,) = of_all_sets(run, notes)
    assert list(table.rows[0]) == ["imagenet: top1", "student", "35.10 %", "37.1 %", "-2.0"]
    assert list(table.rows[1]) == ["imagenet: top5", "student", "60.00 %", "", ""]
    assert table.note.endswith("A caveat.")
    assert notes == []
    (run.folder / "evaluation" / "evaluation.json").write_text('{"results": 3}')
    assert of_all_sets(run, notes) == []
    assert notes == ["some_run: evaluation/evaluation.json cannot be used: KeyError: 'comparison'."]
