"""What a run writes down: metrics.jsonl, TensorBoard's events and Weights & Biases' offline folder, read back."""

import errno
import json
import math
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cosmos_scale.config import LogConfig, WandbConfig
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.errors import UserError
from cosmos_scale.run.metrics import MetricLog
from cosmos_scale.run.trackers import check_trackers, open_trackers
from cosmos_scale.testing.runs import records, train_to_end, write_run
from cosmos_scale.versions import code_facts
from tests.test_files import files_of_at_most

NUMBERS = [
    *("samples", "loss", "clip", "distill", "scale", "distill_scale", "lr", "momentum", "grad_norm"),
    *("samples_per_second", "step_seconds_min", "step_seconds_max", "data_wait_min", "data_wait_max", "data_wait_rank"),
    *("own_seconds_median", "own_seconds_max", "own_seconds_rank", "substituted", "skipped_steps"),
    *("samples_per_second_per_rank", "tflops_per_rank", "executed_tflops_per_rank", "peak_memory_gib"),
    *("useful_seconds", "wall_seconds", "goodput"),
]
OF_LOG = ["eta_seconds"]  # what the log itself adds
QUIET = LogConfig(progress=False)


def record(step: int, loss: float = 1.5) -> dict[str, float]:
    return {"step": step, **dict.fromkeys(NUMBERS, 0.25), "loss": loss}


def opened(folder: Path, config: LogConfig = QUIET, *, first_step: int = 0) -> MetricLog:
    return MetricLog(
        folder, config, name="run", run_config={"seed": 0}, first_step=first_step, last_step=9, steps_per_epoch=4
    )


def steps(folder: Path) -> list[tuple[str, int]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(entry["kind"], entry["step"]) for entry in map(json.loads, lines)]


def events_of(folder: Path) -> EventAccumulator:
    """What TensorBoard reads of a run."""
    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard would show: {tag: {step: value}}."""
    events = events_of(folder)
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_each_launch_leaves_a_record_of_its_start(tmp_path: Path) -> None:
    for first_step, ranks in ((0, 2), (2, 4)):
        with opened(tmp_path, first_step=first_step) as log:
            log.started(ranks, "cpu")
            for step in (first_step + 1, first_step + 2, first_step + 3):
                log.training(record(step))
    assert steps(tmp_path) == [
        ("start", 0),
        ("train", 1),
        ("train", 2),
        ("start", 2),
        *(("train", n) for n in (3, 4, 5)),
    ]
    starts = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "start" in line]
    assert [(start["world_size"], start["device"]) for start in starts] == [(2, "cpu"), (4, "cpu")]
    for start in starts:
        assert {key: start[key] for key in code_facts()} == code_facts()


def test_a_line_a_record_is_on_disk_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = time.time() - 1e-3  # the file has milliseconds
    with opened(tmp_path) as log:
        log.training(record(1))
        assert steps(tmp_path) == [("train", 1)]
        log.evaluation(1, "pairs", {"student": {"R@1": 0.5}, "teacher": {"R@1": 0.25}}, Table("a table"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert before <= line.pop("time") <= time.time() + 1e-3
    assert lines[0].pop("eta_seconds") >= 0
    assert lines[0] == {"kind": "train", **record(1)}
    assert lines[1] == {"kind": "eval", "evaluator": "pairs", "step": 1, "student/R@1": 0.5, "teacher/R@1": 0.25}
    assert "a table" in capsys.readouterr().out


def test_the_evaluators_with_a_record_of_a_step_are_known(tmp_path: Path) -> None:
    """Records of older runs name theirs before the numbers, or are of the one kind that there was."""
    older = [{"student/R@1": 0.5, "teacher/R@1": 0.5}, {"held/student/R@1": 0.5}]
    lines = [json.dumps({"kind": "eval", "step": 1, **numbers}) for numbers in older]
    lines.append(json.dumps({"kind": "eval_failed", "step": 1, "lost/failures": 2}))
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with opened(tmp_path, first_step=1) as log:
        log.evaluation(1, "pairs", {"student": {"R@1": 0.5}}, Table())
        log.evaluation_failed(1, "far", 1)
        log.evaluation_failed(1, "late", 1)
        log.evaluation(1, "late", {"student": {"R@1": 0.5}}, Table())
        measured = {"retrieval": True, "held": True, "lost": False, "pairs": True, "far": False, "late": True}
        assert log.evaluated_at(1) == measured
        assert log.evaluated_at(2) == {}


def test_resumed_run_writes_each_step_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(tmp_path) as log:
        for step in (1, 2, 3, 4):
            log.training(record(step))
        log.evaluation(2, "pairs", {}, Table())
        log.evaluation(4, "pairs", {}, Table())
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 5, "lo')  # killed while it wrote
    with opened(tmp_path, first_step=2) as log:
        log.training(record(3, loss=7.0))
    assert steps(tmp_path) == [("train", 1), ("train", 2), ("eval", 2), ("train", 3)]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["loss"] == 7.0
    said = "metrics.jsonl: dropped 4 lines of steps after 2, taken anew now"
    assert capsys.readouterr().out.splitlines().count(said) == 1


def test_a_full_disk_costs_no_record(tmp_path: Path) -> None:
    """A resume that cannot drop the records of later steps leaves all records; another finds nothing to drop."""
    path = tmp_path / "metrics.jsonl"
    with opened(tmp_path) as log:
        for step in range(1, 9):
            log.training(record(step))
    before = path.read_bytes()
    with files_of_at_most(1000):
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: File too large"):
            opened(tmp_path, first_step=7)
        assert path.read_bytes() == before
        with opened(tmp_path, first_step=8):
            pass
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_lines_that_are_no_records_are_taken_out_and_kept_in_a_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blank lines and the torn end of a killed run are no loss."""
    path = tmp_path / "metrics.jsonl"
    for name in ("metrics.jsonl.old", "metrics.jsonl.old-2"):
        before = b'{"kind": "train", "step": 1}\n7\n\n\xff\xfe\x00\n# my note\n{"step": nul\n{"kind": "e'
        path.write_bytes(before)
        with opened(tmp_path, first_step=3):
            pass
        assert steps(tmp_path) == [("train", 1)]
        assert (tmp_path / name).read_bytes() == before
        said = capsys.readouterr().out.splitlines()
        assert f"metrics.jsonl: took out 4 lines that are no records; the file of before is kept as {name}" in said
        assert "metrics.jsonl: dropped 1 line of steps after 3, taken anew now" in said
    path.write_bytes(b'{"kind": "train", "step": 1}\r\n\r\n{"kind": "e')
    with opened(tmp_path, first_step=3):
        pass
    assert path.read_bytes() == b'{"kind": "train", "step": 1}\n'
    assert not (tmp_path / "metrics.jsonl.old-3").exists()


@pytest.mark.parametrize("before", [b'[{"kind": "train", "step": 1}]', b'{"kind": "train", "step": 1}\n# my note'])
def test_an_end_that_is_no_torn_record_is_kept_in_the_copy(before: bytes, tmp_path: Path) -> None:
    """As a list other programs write all records, without the end of a line: nothing else has them then."""
    (tmp_path / "metrics.jsonl").write_bytes(before)
    with opened(tmp_path, first_step=3):
        assert (tmp_path / "metrics.jsonl.old").read_bytes() == before


def test_a_file_that_is_a_link_stays_one(tmp_path: Path) -> None:
    """The records are on another disk, say; those before the resume would stay there, and the others come here."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("../records")
    (tmp_path / "records").write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n')
    with opened(tmp_path / "run", first_step=1) as log:
        log.training(record(2, loss=7.0))
    assert (tmp_path / "run" / "metrics.jsonl").is_symlink()
    assert [json.loads(line).get("loss") for line in (tmp_path / "records").read_text().splitlines()] == [None, 7.0]


def test_new_run_starts_with_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    with opened(tmp_path) as log:
        log.training(record(1))
    assert steps(tmp_path) == [("train", 1)]


def test_what_is_not_finite_is_null_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(tmp_path, LogConfig(progress=False, tensorboard=True)) as log:
        log.training(record(1, loss=math.nan) | {"clip": math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    entry = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (entry["loss"], entry["clip"], entry["distill"]) == (None, None, 0.25)
    assert math.isnan(scalars(tmp_path)["train/loss"][1])
    assert "loss nan (clip inf" in capsys.readouterr().out


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path) -> None:
    config = LogConfig(progress=False, tensorboard=True)
    with opened(tmp_path, config) as log:
        for step in (1, 2, 3):
            log.training(record(step))
    with opened(tmp_path, config, first_step=1) as log:
        log.training(record(2, loss=7.0))
    assert scalars(tmp_path)["train/loss"] == {1: 1.5, 2: 7.0}


def test_a_run_writes_all_three(tmp_path: Path, scenes: SceneShards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    evaluation = {"every": 2, "retrieval": {"shards": str(scenes.gallery)}}
    run = write_run(tmp_path, scenes, eval=evaluation, log={"tensorboard": True, "wandb": {"mode": "offline"}})
    train_to_end(run, "train.max_steps=4").require(0)
    assert list((tmp_path / "tiny" / "wandb").glob("offline-run-*/run-*.wandb"))
    shown = scalars(tmp_path / "tiny")
    for kind, count in (("train", 4), ("eval", 2)):
        written = records(run, kind=kind)
        assert len(written) == count
        for entry in written:
            for key in entry.keys() - {"kind", "evaluator", "step", "time"}:
                # Events hold float32.
                assert shown[f"{kind}/{key}"][entry["step"]] == pytest.approx(entry[key], rel=1e-6), key
    assert {*NUMBERS, *OF_LOG} == records(run)[0].keys() - {"kind", "step", "time"}
    assert {tag for tag in shown if tag.startswith("train/")} == {f"train/{key}" for key in [*NUMBERS, *OF_LOG]}


@pytest.mark.parametrize(("mode", "environment"), [("offline", "online"), (None, "offline")])
def test_wandb_works_offline_and_goes_on_in_the_same_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Literal["offline"] | None, environment: str
) -> None:
    """Offline as the config says, or where the config says nothing, the environment."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", environment)
    config = LogConfig(progress=False, wandb=WandbConfig(project="scenes", mode=mode))
    for first_step in (0, 1):
        with opened(tmp_path, config, first_step=first_step) as log:
            log.training(record(first_step + 1))
    identity = (tmp_path / "wandb_id").read_text()
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert files
    assert all(file.stat().st_size > 0 for file in files)
    assert steps(tmp_path) == [("train", 1), ("train", 2)]


def test_a_file_of_tensorboard_that_cannot_be_made_is_named_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(errno.EPERM, "not permitted", b"tb/ev\xc3\xa9")  # TensorBoard's files have names of bytes

    monkeypatch.setattr("cosmos_scale.run.trackers._TensorBoard", fail)
    with pytest.raises(UserError, match=r"^log: tb/evé: cannot be written: not permitted$"):
        open_trackers(tmp_path, LogConfig(tensorboard=True), name="tiny", run_config={}, first_step=0)


@pytest.mark.parametrize("value", ["bogus", ""])
def test_what_wandb_refuses_in_the_environment_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", value)
    config = LogConfig(progress=False, wandb=WandbConfig(project="scenes", mode="offline"))
    with pytest.raises(UserError, match=r"^WANDB_MODE: [^\n]*$"):
        MetricLog(tmp_path / "run", config, name="tiny", run_config={}, first_step=0, last_step=2, steps_per_epoch=2)
    with pytest.raises(UserError, match=r"^WANDB_MODE: "):  # the dry run
        check_trackers(config)


def test_wandb_without_a_login_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = LogConfig(progress=False, wandb=WandbConfig(project="scenes", mode="online"))
    refusal = r"^log\.wandb: [^\n]*log\.wandb\.mode to offline$"
    with pytest.raises(UserError, match=refusal):  # the launch's looks, and the dry run's
        check_trackers(config)
    with pytest.raises(UserError, match=refusal):
        MetricLog(tmp_path / "run", config, name="tiny", run_config={}, first_step=0, last_step=2, steps_per_epoch=2)
    monkeypatch.setattr("wandb.login", lambda *, prompt, verify: not prompt and not verify)  # a key is there
    check_trackers(config)


def wandb_messages(folder: Path, name: str = "*") -> list[Any]:
    """What the offline files of Weights & Biases under a run's folder hold, launch by launch. name: of one record."""
    import wandb.proto.wandb_internal_pb2 as messages  # here: the import takes a second

    parse: Any = vars(messages)["Record"].FromString  # the module's names are made as it is imported
    files = sorted((folder / "wandb").glob(f"offline-run-*/run-{name}.wandb"))
    return [parse(data) for path in files for data in parts(path)]


def wandb_records(folder: Path, name: str = "*") -> list[dict[str, Any]]:
    """The records in the offline files of Weights & Biases under a run's folder, in the order of writing."""
    entries = wandb_messages(folder, name)
    histories = [entry.history.item for entry in entries if entry.WhichOneof("record_type") == "history"]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in one} for one in histories]


def parts(path: Path) -> Iterator[bytes]:
    """The messages of a file in LevelDB's log format: pieces of [checksum, length, kind, data] in blocks of 32 KiB."""
    data, position, message = path.read_bytes(), len(":W&B") + 3, b""
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:  # no piece begins in a block's last bytes
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole message, or a message's last piece
            yield message
            message = b""


def test_wandb_keeps_what_is_written_behind_the_last_step(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run that goes back to step 2 writes steps 3 and 4 again, with the library's own count at 5 by then."""
    config = LogConfig(progress=False, wandb=WandbConfig(project="scenes", mode="offline"))
    with opened(tmp_path, config) as log:
        for step in (4, 5, 3, 4):
            log.training(record(step, loss=step + 0.5))
    found = wandb_records(tmp_path)
    assert [(entry["step"], entry["train/loss"]) for entry in found] == [(4, 4.5), (5, 5.5), (3, 3.5), (4, 4.5)]
    captured = capfd.readouterr()
    assert captured.err == ""  # the library says nothing by itself
    assert captured.out.splitlines()[0].startswith("log.wandb: offline; to send it: wandb sync ")
    assert len(captured.out.splitlines()) == 1 + 2 * 4


def test_records_wait_where_metrics_and_tensorboard_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(tmp_path, LogConfig(progress=False, tensorboard=True)) as log:
        log.training(record(1))
        with files_of_at_most(700):
            for step in (2, 3, 4):
                log.training(record(step))
            assert steps(tmp_path)[-1][1] < 4
        log.training(record(5))
    assert steps(tmp_path) == [("train", step) for step in (1, 2, 3, 4, 5)]
    assert scalars(tmp_path)["train/loss"] == dict.fromkeys((1, 2, 3, 4, 5), 1.5)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    for said in ("its records are kept, and the run goes on", "takes records again"):
        assert captured.out.count(said) == 1


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "damaged.jsonl"])
def test_a_folder_in_the_way_is_one_line_of_all_ranks(
    tmp_path: Path, scenes: SceneShards, name: str, ranks: int
) -> None:
    run = write_run(tmp_path, scenes)
    (tmp_path / "tiny" / name).mkdir(parents=True)
    finished = train_to_end(run, "train.max_steps=1", ranks=ranks).require(2)
    assert finished.errors.count("\n") == 1
    assert f"tiny/{name} is no file; rule: move it away" in finished.errors


def test_a_run_without_output_trains_to_the_end(tmp_path: Path, scenes: SceneShards) -> None:
    """Standard output on a full disk, and a reader that leaves after one line, as head does."""
    run = write_run(tmp_path, scenes)
    command = f"{sys.executable} -m cosmos_scale.cli train {run} train.max_steps=8"  # many lines behind the first
    for name, output in (("full", "> /dev/full"), ("head", "| head -1")):
        shell = ["bash", "-c", f"set -o pipefail; {command} name={name} {output}"]
        ended = subprocess.run(shell, capture_output=True, text=True, check=False, timeout=240)
        assert ended.returncode == 0, ended.stderr
        assert (tmp_path / name / "checkpoints" / "step-00000008" / "manifest.json").exists()
        assert re.fullmatch(r"warning: standard output: [\w ]+; the run goes on without it\n", ended.stderr)


def test_a_console_line_tells_the_place_in_the_run_and_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = dict.fromkeys([*NUMBERS, "mfu", "hfu"], 123.456789) | {"samples_per_second": 123456.7, "lr": 1.234e-5}
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with MetricLog(
        tmp_path, QUIET, name="run", run_config={}, first_step=0, last_step=400_000, steps_per_epoch=12_500
    ) as log:
        clock[0] += 3600.0
        shares = {"mfu": 0.3387, "hfu": 0.4001}
        log.training({"step": 100_000, **long, **shares, "data_wait_min": 0.0, "data_wait_rank": 1023})
        log.training({"step": 5, **long, **shares})
    learns, fast, early, _ = capsys.readouterr().out.splitlines()
    assert early.startswith("step      5/400000 epoch 0.0 eta ")  # numbers stand below each other
    assert learns.startswith("step 100000/400000 epoch 8.0 eta 3h00m  loss 123.5 (clip ")
    speed = (
        r"  123457 samples/s \(123 a rank\)  123 TFLOP/s  MFU 33.9 % HFU 40.0 %  123.5 GiB  wait 123 s \(rank 1023\)"
    )
    assert re.fullmatch(speed + r"  \d\d:\d\d:\d\d", fast)
    assert max(map(len, (learns, fast))) <= 120
