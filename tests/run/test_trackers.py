"""One run in three places: the same names, hyper-parameters, tables and pictures, and one curve where it resumes."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.table import Table
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from cosmos_scale.config import LogConfig, WandbConfig
from cosmos_scale.run.metrics import MetricLog
from cosmos_scale.run.trackers import (
    LARGEST_PICTURE,
    MOST_PICTURES,
    KeptRecords,
    TrackerEntry,
    flattened,
    open_trackers,
    pictures_in,
)
from tests.run.test_metrics import events_of, record, scalars, steps, wandb_messages, wandb_records

CONFIG = {"seed": 7, "train": {"global_batch": 8, "max_steps": None}, "eval": [{"every": 2}], "precision": "fp32"}
FLAT = {
    "seed": 7,
    "train.global_batch": 8,
    "train.max_steps": "null",
    "eval": '[{"every": 2}]',
    "precision": "fp32",
}
ALL_THREE = LogConfig(progress=False, tensorboard=True, wandb=WandbConfig(project="scenes", mode="offline"))
TABLE = [["R@1", 0.75, 0.25], ["images", 40, 40]]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that took four steps, went back to a checkpoint of step 2, and took steps 3 and 4 again."""
    folder = tmp_path_factory.mktemp("resumed")
    pictures = folder / "evaluation"
    pictures.mkdir()
    for first_step, loss in ((0, 1.5), (2, 7.0)):
        Image.new("RGB", (2 * LARGEST_PICTURE, 100), (200, 10, 10)).save(pictures / "confusions.png")
        with MetricLog(
            folder,
            ALL_THREE,
            name="run",
            run_config=CONFIG,
            first_step=first_step,
            last_step=4,
            steps_per_epoch=4,
        ) as log:
            for step in range(first_step + 1, 5):
                log.training(record(step, loss=loss))
            results = {"student": {"R@1": 0.75, "images": 40}, "teacher": {"R@1": 0.25, "images": 40}}
            log.evaluation(4, "pairs", results, Table(), {"student": pictures, "teacher": folder / "none"})
    return folder


@pytest.fixture(scope="module")
def events(resumed: Path) -> EventAccumulator:
    """What TensorBoard's pages show, which read all data as tensors: scalars, texts and pictures."""
    events = EventAccumulator(str(resumed / "tensorboard"), {"tensors": 0})
    events.Reload()
    return events


def test_each_step_has_one_record(resumed: Path) -> None:
    assert steps(resumed) == [("train", step) for step in (1, 2, 3, 4)] + [("eval", 4)]


def test_tensorboard_shows_one_curve_with_what_was_taken_last(resumed: Path) -> None:
    shown = scalars(resumed)
    assert shown["train/loss"] == {1: 1.5, 2: 1.5, 3: 7.0, 4: 7.0}
    assert shown["eval/student/R@1"] == {4: 0.75}


def test_wandb_drops_no_record_and_puts_all_of_them_over_the_runs_own_steps(resumed: Path) -> None:
    found = [entry for entry in wandb_records(resumed) if "train/loss" in entry]
    assert [(entry["step"], entry["train/loss"]) for entry in found] == [
        *[(step, 1.5) for step in (1, 2, 3, 4)],
        *[(step, 7.0) for step in (3, 4)],
    ]
    launches = sorted((resumed / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(launches) == 2
    assert len({path.name for path in launches}) == 1, "one record at the service"
    axes = [message.metric for message in wandb_messages(resumed) if message.WhichOneof("record_type") == "metric"]
    assert {metric.step_metric for metric in axes if metric.glob_name == "*"} == {"step"}


def test_hyper_parameters_are_the_resolved_config(resumed: Path, events: EventAccumulator) -> None:
    assert flattened(CONFIG) == FLAT
    found = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(found["_hparams_/session_start_info"]).session_start_info.hparams
    values = {
        key: value.string_value if value.HasField("string_value") else value.number_value
        for key, value in start.items()
    }
    assert values == FLAT
    metrics = HParamsPluginData.FromString(found["_hparams_/experiment"]).experiment.metric_infos
    assert {metric.name.tag for metric in metrics} < scalars(resumed).keys()
    assert "_hparams_/session_end_info" in found  # it ended well
    (text,) = {event.tensor_proto.string_val[0].decode() for event in events.Tensors("config/text_summary")}
    assert "| train.global_batch | 8 |" in text.splitlines()
    for message in wandb_messages(resumed):
        if message.WhichOneof("record_type") == "run":
            sent = {item.key: json.loads(item.value_json) for item in message.run.config.update}
            assert {key: sent[key] for key in CONFIG} == CONFIG


def test_tables_and_pictures_go_with_an_evaluation(resumed: Path, events: EventAccumulator) -> None:
    (table,) = events.Tensors("eval/pairs/table/text_summary")
    assert table.step == 4
    lines = ["| metric | student | teacher |", "| --- | --- | --- |", "| R@1 | 0.75 | 0.25 |", "| images | 40 | 40 |"]
    assert table.tensor_proto.string_val[0].decode().splitlines() == lines
    (image,) = events.Tensors("eval/student/confusions")
    width, _, encoded = image.tensor_proto.string_val
    assert (image.step, int(width)) == (4, LARGEST_PICTURE)
    assert Image.open(io.BytesIO(encoded)).convert("RGB").getpixel((5, 5)) == (200, 10, 10)
    assert list(events.PluginTagToContent("images")) == ["eval/student/confusions"]  # the teacher has left none

    rows = [entry for entry in wandb_records(resumed) if "eval/pairs/table._type" in entry]
    assert [entry["step"] for entry in rows] == [4, 4]
    files = max((resumed / "wandb").glob("offline-run-*")) / "files"
    written = json.loads((files / str(rows[-1]["eval/pairs/table.path"])).read_text())
    assert written["columns"] == ["metric", "student", "teacher"]
    assert written["data"] == TABLE
    assert Image.open(files / str(rows[-1]["eval/student/confusions.path"])).width == LARGEST_PICTURE


def test_a_picture_that_is_gone_is_left_out(tmp_path: Path) -> None:
    """The entry is written without it: waiting would hold up all that follows."""
    said: list[str] = []
    (tracker,) = open_trackers(
        tmp_path, LogConfig(progress=False, tensorboard=True), name="run", run_config={}, first_step=0
    )
    kept = KeptRecords(tracker, said.append)
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    pictures = {"eval/student/gone": tmp_path / "gone.png", "eval/student/torn": tmp_path / "torn.png"}
    kept.write(TrackerEntry(1, {"eval/student/R@1": 0.5}, {}, pictures))
    kept.close(failed=True)
    assert said == []
    events = events_of(tmp_path)
    assert events.Tags()["images"] == []
    assert scalars(tmp_path)["eval/student/R@1"] == {1: 0.5}
    assert "_hparams_/session_end_info" not in events.PluginTagToContent("hparams")  # it failed


def test_a_folders_first_pictures_are_taken(tmp_path: Path) -> None:
    names = [f"{number:05d}.png" for number in range(MOST_PICTURES + 2)]
    for name in ["confusions.csv", "00000.txt", *reversed(names)]:
        (tmp_path / name).touch()
    assert [path.name for path in pictures_in(tmp_path)] == names[:MOST_PICTURES]
    assert pictures_in(tmp_path / "none") == []
