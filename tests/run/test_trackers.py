"""One run in three places: the same names, hyper-parameters, tables and pictures, and one curve where it resumes."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from rich.table import Table
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from cosmos_scale.config import LogConfig, WandbConfig
from cosmos_scale.errors import UserError
from cosmos_scale.run import wandb_tracker
from cosmos_scale.run.folder import evaluation_folder
from cosmos_scale.run.metrics import MetricLog
from cosmos_scale.run.tracker_entries import LARGEST_PICTURE, MOST_PICTURES, TrackerEntry, pictures_in
from cosmos_scale.run.trackers import KeptRecords, check_trackers, flattened, open_trackers
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


def take_steps(folder: Path, first_step: int, last_step: int, loss: float, config: LogConfig = ALL_THREE) -> None:
    """A launch of a run in `folder`, with an evaluation and a picture of its student at each even step."""
    with MetricLog(
        folder, config, name="run", run_config=CONFIG, first_step=first_step, last_step=9, steps_per_epoch=4
    ) as log:
        for step in range(first_step + 1, last_step + 1):
            log.training(record(step, loss=loss))
            if step % 2 == 0:
                left = {model: evaluation_folder(folder, "pairs", step, model) for model in ("student", "teacher")}
                left["student"].mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (2 * LARGEST_PICTURE, 100), (200, 10, step)).save(left["student"] / "confusions.png")
                results = {"student": {"R@1": 0.75, "images": 40}, "teacher": {"R@1": 0.25, "images": 40}}
                log.evaluation(step, "pairs", results, Table(), left)


def newest_record(folder: Path) -> str:
    return (folder / "wandb_id").read_text()


def record_names(folder: Path) -> set[str]:
    """All records that launches have begun or gone on with at Weights & Biases."""
    return {path.stem.removeprefix("run-") for path in (folder / "wandb").glob("offline-run-*/run-*.wandb")}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that took four steps, went back to a checkpoint of step 2, and took steps 3 and 4 again."""
    folder = tmp_path_factory.mktemp("resumed")
    take_steps(folder, 0, 4, loss=1.5)
    take_steps(folder, 2, 4, loss=7.0)
    return folder


@pytest.fixture(scope="module")
def events(resumed: Path) -> EventAccumulator:
    """What TensorBoard's pages show, which read all data as tensors: scalars, texts and pictures."""
    events = EventAccumulator(str(resumed / "tensorboard"), {"tensors": 0})
    events.Reload()
    return events


def test_each_step_has_one_record(resumed: Path) -> None:
    expected = [("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("train", 4), ("eval", 4)]
    assert steps(resumed) == expected


def test_tensorboard_shows_one_curve_with_what_was_taken_last(resumed: Path) -> None:
    shown = scalars(resumed)
    assert shown["train/loss"] == {1: 1.5, 2: 1.5, 3: 7.0, 4: 7.0}
    assert shown["eval/student/R@1"] == {2: 0.75, 4: 0.75}


def test_wandb_has_one_curve_in_a_new_record_and_names_it_in_the_earlier_one(resumed: Path) -> None:
    """The new record has what metrics.jsonl has, one value a step, with steps and times that grow."""
    newest = newest_record(resumed)
    (earlier,) = {name for name in record_names(resumed) if name != newest}
    found = wandb_records(resumed, newest)
    logged = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["_timestamp"]) for entry in found] == [(one["step"], one["time"]) for one in logged]
    assert [one["step"] for one in logged] == [1, 2, 2, 3, 4, 4]
    for sent, one in zip(found, logged, strict=True):
        numbers = {f"{one['kind']}/{key}": value for key, value in one.items() if isinstance(value, float | int)}
        numbers = {key: value for key, value in numbers.items() if key.partition("/")[2] not in ("step", "time")}
        assert {key: value for key, value in sent.items() if key in numbers} == numbers
    assert [entry["train/loss"] for entry in found if "train/loss" in entry] == [1.5, 1.5, 7.0, 7.0]

    runs = [message.run for message in wandb_messages(resumed) if message.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.display_name) for run in runs} == {
        (earlier, "run"),
        (earlier, "run (superseded)"),
        (newest, "run"),
    }
    changed = [message.config for message in wandb_messages(resumed, earlier) if message.HasField("config")]
    later = {item.key: json.loads(item.value_json) for config in changed for item in config.update}
    assert later["superseded_by"] == newest
    axes = [message.metric for message in wandb_messages(resumed) if message.WhichOneof("record_type") == "metric"]
    assert {metric.step_metric for metric in axes if metric.glob_name == "*"} == {"step"}


def test_only_steps_that_are_taken_again_make_a_new_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A launch that logs elsewhere notes it too; what has been logged in between is in the new record."""
    elsewhere = ALL_THREE.model_copy(update={"wandb": None, "tensorboard": False})
    only_wandb = ALL_THREE.model_copy(update={"tensorboard": False})
    take_steps(tmp_path, 0, 2, loss=1.0, config=only_wandb)
    first = newest_record(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "stop", "step": 3, "time": 1.0}\n{"kind": "train", "step": 3, "lo')  # never sent
    take_steps(tmp_path, 2, 3, loss=2.0, config=only_wandb)
    assert newest_record(tmp_path) == first
    take_steps(tmp_path, 1, 3, loss=3.0, config=elsewhere)
    assert not (tmp_path / "wandb_id").exists()
    capsys.readouterr()
    take_steps(tmp_path, 3, 4, loss=4.0, config=only_wandb)
    second = newest_record(tmp_path)
    assert record_names(tmp_path) == {first, second}
    said = f"log.wandb: steps are taken again: record {second}, with 4 earlier entries, takes the place of {first}"
    assert said in capsys.readouterr().out.splitlines()
    losses = [(entry["step"], entry.get("train/loss")) for entry in wandb_records(tmp_path, second)]
    assert losses == [(1, 1.0), (2, 3.0), (2, None), (3, 3.0), (4, 4.0), (4, None)]
    assert {path.name for path in tmp_path.glob("wandb_id*")} == {"wandb_id"}


def test_a_folder_of_the_record_that_is_removed_meanwhile_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ALL_THREE.model_copy(update={"tensorboard": False})
    with MetricLog(tmp_path, config, name="run", run_config={}, first_step=0, last_step=9, steps_per_epoch=4) as log:
        log.training(record(1, loss=1.0))
        shutil.rmtree(tmp_path / "wandb")
    assert re.search(r"log\.wandb: .*/offline-run-\S+ was removed while the run went on", capsys.readouterr().out)


@pytest.mark.parametrize("torn", [b"", b"\0" * 8])
def test_a_torn_name_of_the_record_is_replaced_and_the_new_record_is_whole(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / "wandb_id").write_bytes(torn)
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 1, "loss": null}\n7\n{"kind": "eval", "step": 1, "held/student/R@1": 0.5}\n'
    )
    take_steps(tmp_path, 1, 1, loss=1.0, config=ALL_THREE.model_copy(update={"tensorboard": False}))
    loss, found = wandb_records(tmp_path, newest_record(tmp_path))
    assert loss["step"] == 1
    assert math.isnan(loss["train/loss"])
    assert (found["step"], found["eval/held/student/R@1"]) == (1, 0.5)
    assert found["eval/held/table._type"] == "table-file"


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
    tables = events.Tensors("eval/pairs/table/text_summary")
    assert [table.step for table in tables] == [2, 4]
    table = tables[-1]
    lines = ["| metric | student | teacher |", "| --- | --- | --- |", "| R@1 | 0.75 | 0.25 |", "| images | 40 | 40 |"]
    assert table.tensor_proto.string_val[0].decode().splitlines() == lines
    image = events.Tensors("eval/student/confusions")[-1]
    width, _, encoded = image.tensor_proto.string_val
    assert (image.step, int(width)) == (4, LARGEST_PICTURE)
    assert Image.open(io.BytesIO(encoded)).convert("RGB").getpixel((5, 5)) == (200, 10, 4)
    assert list(events.PluginTagToContent("images")) == ["eval/student/confusions"]  # the teacher has left none

    newest = newest_record(resumed)
    rows = [entry for entry in wandb_records(resumed, newest) if "eval/pairs/table._type" in entry]
    assert [entry["step"] for entry in rows] == [2, 4]
    (files,) = (resumed / "wandb").glob(f"offline-run-*-{newest}/files")
    for row in rows:  # the first is of the launch before
        written = json.loads((files / str(row["eval/pairs/table.path"])).read_text())
        assert written["columns"] == ["metric", "student", "teacher"]
        assert written["data"] == TABLE
        picture = Image.open(files / str(row["eval/student/confusions.path"]))
        assert picture.width == LARGEST_PICTURE
        assert picture.getpixel((5, 5)) == (200, 10, row["step"])


def test_a_picture_that_is_gone_is_left_out(tmp_path: Path) -> None:
    """The entry is written without it: waiting would hold up all that follows."""
    said: list[str] = []
    (tracker,) = open_trackers(
        tmp_path, LogConfig(progress=False, tensorboard=True), name="run", run_config={}, first_step=0
    )
    kept = KeptRecords(tracker, said.append)
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    pictures = {"eval/student/gone": tmp_path / "gone.png", "eval/student/torn": tmp_path / "torn.png"}
    kept.write(TrackerEntry(1, 0.0, {"eval/student/R@1": 0.5}, {}, pictures))
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


def take_steps_and_signal_wandb(folder: Path, signals: dict[int, int], last_step: int, goes_on: bool) -> None:
    """In a process of its own: steps, and the library's process gets a signal after some of them.

    Entries are so large that a few fill the way to a process that reads nothing. goes_on: whether that process can be
    told to go on; as one of a frozen control group cannot.
    """
    written = MetricLog.training

    def training(log: MetricLog, step: dict[str, float]) -> None:
        written(log, {**step, **{f"{number:0200}": 0.5 for number in range(500)}})
        sent = signals.get(int(step["step"]))
        if sent is not None:
            pids = [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
            (core,) = [pid for pid in pids if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            os.kill(core, sent)
            while (
                sent == signal.SIGKILL and Path(f"/proc/{core}/cmdline").read_bytes()
            ):  # until its connection is closed
                time.sleep(0.01)
            time.sleep(2.0 if sent == signal.SIGCONT else 0.0)  # so that it reads what is on its way

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricLog, "training", training)
        for name in ("LONGEST_WRITE", "LONGEST_CLOSE"):
            patch.setattr(wandb_tracker, name, 3.0)
        if not goes_on:
            patch.setattr(signal, "SIGCONT", 0)
        take_steps(folder, 0, last_step, 1.0, ALL_THREE.model_copy(update={"tensorboard": False}))


def in_a_process(
    folder: Path, signals: dict[int, int], last_step: int, *, goes_on: bool = True, **env: str
) -> list[str]:
    """Take the steps to the end of the process and of its output; return what is said of Weights & Biases."""
    code = f"take_steps_and_signal_wandb(Path({str(folder)!r}), {signals}, {last_step}, {goes_on})"
    imports = "from pathlib import Path; from tests.run.test_trackers import take_steps_and_signal_wandb"
    command = [sys.executable, "-c", f"{imports}; {code}"]
    ended = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=240, check=False)
    errors = [line for line in ended.stderr.splitlines() if line != "wandb: ERROR Problem finishing run"]
    assert (ended.returncode, errors) == (0, [])
    assert [step for kind, step in steps(folder) if kind == "train"] == [*range(1, last_step + 1)]
    return [line.removeprefix("log.wandb: ") for line in ended.stdout.splitlines() if line.startswith("log.wandb: ")]


def test_a_run_goes_on_without_wandbs_process_and_without_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    said = in_a_process(tmp_path, {1: int(signal.SIGKILL)}, 4, HOME="/proc", WANDB_DIR="/proc/none")
    _, kept, closed = said
    assert kept.endswith("; its records are kept, and the run goes on")
    assert closed.startswith("cannot be closed: ")
    assert closed.endswith(" records are missing there, which metrics.jsonl has")


def test_an_evaluation_reaches_wandb_without_a_home_that_takes_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its table goes through a folder of the library in the home, and held up all records behind it."""
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    said = in_a_process(tmp_path, {}, 4, HOME="/proc")
    assert [line.partition(";")[0] for line in said] == ["offline"]
    entries = wandb_records(tmp_path, newest_record(tmp_path))
    assert [entry["step"] for entry in entries if "eval/pairs/table._type" in entry] == [2, 4]


NOT_TAKEN = (
    "TimeoutError: the library's process has not taken an entry within 3 s; its records are kept, and the run goes on"
)
NOT_ENDED = (
    "cannot be closed: TimeoutError: the library's process has not ended the record within 3 s, and what it has not "
    "written is missing there; what it has written: wandb sync {folder}/wandb/offline-run-"
)
STOP, GO_ON = int(signal.SIGSTOP), int(signal.SIGCONT)


def test_a_run_goes_on_and_ends_beside_a_wandb_that_is_stuck(tmp_path: Path) -> None:
    """The library waits for its process for ever, once the way to it is full, and at the end in any case."""
    _, kept, closed = in_a_process(tmp_path, {1: STOP}, 12, goes_on=False)
    assert kept == NOT_TAKEN
    assert closed.startswith(NOT_ENDED.format(folder=tmp_path))
    assert re.search(r"; \d+ records are missing there, which metrics\.jsonl has$", closed)


@pytest.mark.slow
def test_a_run_ends_beside_a_wandb_that_is_stuck_at_its_end(tmp_path: Path) -> None:
    _, closed = in_a_process(tmp_path, {2: STOP}, 2, goes_on=False)
    assert closed.startswith(NOT_ENDED.format(folder=tmp_path))
    assert "records are missing" not in closed


def test_a_wandb_that_is_stopped_at_its_end_goes_on_and_has_all(tmp_path: Path) -> None:
    assert len(in_a_process(tmp_path, {1: STOP}, 2)) == 1  # that it is offline
    assert train_steps(tmp_path) == [1, 2]


@pytest.mark.slow
def test_a_wandb_that_goes_on_has_each_entry_once(tmp_path: Path) -> None:
    _, kept, again = in_a_process(tmp_path, {1: STOP, 9: GO_ON}, 11)
    assert kept == NOT_TAKEN
    assert again == "takes records again"
    assert train_steps(tmp_path) == [*range(1, 12)]


def train_steps(folder: Path) -> list[int]:
    (name,) = record_names(folder)
    return [entry["step"] for entry in wandb_records(folder, name) if "train/loss" in entry]


def test_a_service_that_is_not_there_is_told_soon(tmp_path: Path) -> None:
    """The library's own limit is 90 s."""
    config = LogConfig(progress=False, wandb=WandbConfig(project="scenes", mode="online"))
    code = (
        "from pathlib import Path; from cosmos_scale.config import *; from cosmos_scale.errors import UserError\n"
        "from cosmos_scale.run import trackers, wandb_tracker\n"
        "wandb_tracker.LONGEST_INIT = 2.0\n"
        f"config = LogConfig.model_validate({config.model_dump()})\n"
        f"try: trackers.open_trackers(Path({str(tmp_path)!r}), config, name='run', run_config={{}}, first_step=0)\n"
        "except UserError as error: print(error)"
    )
    env = {**os.environ, "HOME": str(tmp_path), "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("log.wandb: ")]
    assert line.endswith("or set log.wandb.mode to offline; WANDB_INIT_TIMEOUT allows more seconds")


@pytest.mark.parametrize("name", ["WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT"])
@pytest.mark.parametrize("value", ["90 s", "", "-1", "inf", "nan"])
def test_a_wrong_limit_for_wandb_is_refused_by_the_dry_run_too(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """The library names keys of its own; it takes infinite limits, which no wait does."""
    monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=rf"^{name}: '{value}'; rule: a number of seconds from 0 to 1,000,000, or unset$"
    ):
        check_trackers(LogConfig(wandb=WandbConfig(project="scenes", mode="offline")))


def test_no_login_is_asked_for_where_none_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_CONSOLE", "none")
    config = LogConfig(progress=False, wandb=WandbConfig(project="scenes", mode="offline"))
    with pytest.raises(
        UserError, match=r"^log\.wandb: [^\n]*console[^\n]*; rule: mend what it names, or leave log\.wandb out$"
    ):
        open_trackers(tmp_path, config, name="tiny", run_config={}, first_step=0)
