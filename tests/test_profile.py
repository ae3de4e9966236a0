"""`cosmos-scale profile` on two real ranks: the phases add up, all parts are measured, and the run is not touched."""

import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cosmos_scale.cli.main import main
from cosmos_scale.config import RunConfig
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.phases import SAMPLE_PARTS, STEP_PHASES
from cosmos_scale.profile import TRACED
from cosmos_scale.profiling.profile_record import PROFILE_FILE, write_record
from cosmos_scale.testing.runs import start_command, write_run
from cosmos_scale.words import COLUMNS
from tests.conftest import REPOSITORY
from tests.profiling.invented import rank_profile, record_of

STEPS, SECONDS = 6, 300.0
PEAK_TOLERANCE = 0.03
MOST_UNNAMED, MOST_COST = 0.03, 0.02  # of a step


class Profiled(NamedTuple):
    """A profile of the tiny run: where the run is, what was printed, and the record that was written."""

    folder: Path
    output: str
    errors: str
    record: dict[str, Any]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory, scenes: SceneShards) -> Profiled:
    folder = tmp_path_factory.mktemp("profiled")
    write_record(record_of([rank_profile(on_gpu=False)]), folder)
    run = write_run(folder, scenes, zero={"stage": 1})
    argv = ("profile", str(run), "--ranks", "2", "--steps", str(STEPS), "--warm-up", "2", "--trace", "--planned")
    with start_command(*argv, "--compare", str(folder / PROFILE_FILE)) as process:
        finished = process.wait(SECONDS).require(0)
    record = json.loads((folder / "tiny" / "profile" / PROFILE_FILE).read_bytes())
    assert max(map(len, finished.output.splitlines())) <= COLUMNS + len(str(folder))  # paths stay whole
    return Profiled(folder / "tiny", " ".join(finished.output.split()), finished.errors, record)


def test_the_phases_add_up_to_the_step(profiled: Profiled) -> None:
    # The intervals cover a step by their making: what is left over is what no phase names.
    assert abs(profiled.record["sum"]["difference"]) <= MOST_UNNAMED
    names = [phase["name"] for phase in profiled.record["phases"]]
    assert names == [*STEP_PHASES, "rest"]
    share = 100 * (1 - profiled.record["sum"]["difference"])
    assert f"add up to {share:.1f} % of a step with marks (" in profiled.output
    # Some 30 marks of 1 us in steps of tens of milliseconds: a bound far from what is measured.
    assert 0.0 < profiled.record["cost"]["marks"] < MOST_COST
    assert "profiling itself cost" in profiled.output


def test_each_phase_has_its_ranks(profiled: Profiled) -> None:
    for phase in profiled.record["phases"]:
        assert 0.0 < phase["rank_min_ms"] <= phase["rank_max_ms"]
        assert phase["rank_max"] in (0, 1)
        assert phase["device_ms"]["low"] <= phase["device_ms"]["median"] <= phase["device_ms"]["high"]
    (backward,) = (phase for phase in profiled.record["phases"] if phase["name"] == "backward")
    assert [part["label"] for part in backward["parts"]] == ["of which reduction exposed"]
    assert "rank min .. max" in profiled.output


def test_the_collectives_are_those_of_the_step(profiled: Profiled) -> None:
    rows = {(row["phase"], row["kind"]): row for row in profiled.record["collectives"]}
    # loss/gather.py says what the loss has. The agreement before a step is one small message.
    loss = {kind: row["calls"] for (phase, kind), row in rows.items() if phase == "loss"}
    assert loss == {"all_gather": 1, "all_reduce": 3, "reduce_scatter": 1}
    assert rows["ranks", "all_reduce"]["calls"] == 1
    assert rows["backward", "reduce_scatter"]["calls"] == rows["refresh", "all_gather"]["calls"] >= 2
    config = RunConfig.model_validate(profiled.record["config"])
    # Image features of the student, image and text features of the teacher: float32 of the whole batch.
    columns = 2 * config.data.views.global_crops + config.data.captions.global_count
    gathered = 4 * columns * config.train.global_batch * config.model.embed_dim
    assert 1e6 * rows["loss", "all_gather"]["mbytes"] == pytest.approx(gathered)
    # Each parameter's gradient travels once, in float32, with a little padding.
    scattered = rows["backward", "reduce_scatter"]
    parameters = sum(parameter.numel() for parameter in CosmosModel(config.model).parameters())
    assert 1e6 * scattered["mbytes"] * scattered["calls"] / 4 == pytest.approx(parameters, rel=1e-3)
    assert scattered["ms"] > 0.0


def test_the_plan_is_what_was_measured(profiled: Profiled) -> None:
    measured = {(row["phase"], row["kind"]): row for row in profiled.record["collectives"] if row["phase"] != "ranks"}
    planned = {(row["phase"], row["kind"]): row for row in profiled.record["planned"]["collectives"]}
    assert {place: row["calls"] for place, row in measured.items()} == {
        place: row["calls"] for place, row in planned.items()
    }
    for place, row in measured.items():
        if row["mbytes"] is not None:  # a trace does not tell a scalar's bytes
            assert row["mbytes"] == pytest.approx(planned[place]["mbytes"]), place
    peak = profiled.record["planned"]["peak_bytes"]
    assert profiled.record["memory"]["peak_bytes"] == pytest.approx(peak, rel=PEAK_TOLERANCE)
    assert "(planned " in profiled.output


def test_one_rank_holds_what_is_planned(tmp_path: Path, scenes: SceneShards) -> None:
    """Where no gradient is sent, all of them are held at once."""
    run = write_run(tmp_path, scenes, zero={"stage": 1})
    with start_command("profile", str(run), "--steps", "1", "--warm-up", "1", "--planned") as process:
        process.wait(SECONDS).require(0)
    record = json.loads((tmp_path / "tiny" / "profile" / PROFILE_FILE).read_bytes())
    assert record["memory"]["peak_bytes"] == pytest.approx(record["planned"]["peak_bytes"], rel=PEAK_TOLERANCE)


def test_loader_memory_and_waits_are_there(profiled: Profiled) -> None:
    record = profiled.record
    assert set(record["loader"]["parts"]) == {*SAMPLE_PARTS, "rest"}
    assert record["memory"]["peak_phase"] in STEP_PHASES
    held = sum(record["memory"]["owners"].values())
    assert held == record["memory"]["peak_bytes"]
    assert record["memory"]["states_by_formula"] is True
    # Which of the collectives are waited for long enough to be listed depends on how the ranks meet.
    waits = [wait for wait in record["waits"] if wait["what"] == "a collective"]
    assert waits
    assert all((REPOSITORY / wait["place"].partition(":")[0]).is_file() for wait in waits)
    assert record["operators"]["kinds"]["matmul"] > 0.0


def test_the_run_is_not_touched(profiled: Profiled) -> None:
    assert [path.name for path in profiled.folder.iterdir()] == ["profile"]
    written = {path.name for path in (profiled.folder / "profile").iterdir()}
    assert written == {PROFILE_FILE, "trace.rank0.json.gz", "trace.rank1.json.gz", "logs"}
    assert set(profiled.record["files"]) == written - {"logs"}


def test_the_launch_says_where_its_ranks_are(profiled: Profiled) -> None:
    assert "cosmos-scale profile: 2 ranks on " in profiled.errors
    assert len(list((profiled.folder / "profile" / "logs").glob("*.log"))) == 2


def test_a_trace_has_the_phases_of_its_steps(profiled: Profiled) -> None:
    packed = (profiled.folder / "profile" / "trace.rank1.json.gz").read_bytes()
    names = [event["name"] for event in json.loads(gzip.decompress(packed))["traceEvents"]]
    assert names.count("phase:step") == names.count("phase:student") == TRACED + 1


def test_the_comparison_is_printed(profiled: Profiled) -> None:
    assert "before:" in profiled.output
    assert profiled.record["compared"]["phases"]["student"]["before"]["median"] == pytest.approx(20.2)
    assert "other keys" in profiled.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--compare", "none.json"), "none.json: cannot be read"),
        (("--ranks", "3"), "ranks that would do: "),
        (("--steps", "0"), "must be a whole number of at least 1"),
    ],
)
def test_refusals(
    tmp_path: Path, scenes: SceneShards, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    run = write_run(tmp_path, scenes)
    try:
        status = main(["profile", str(run), *arguments])
    except SystemExit as end:  # of argparse
        status = int(end.code or 0)
    assert status == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()
