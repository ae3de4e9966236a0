"""The command plan: what it refuses, and a plan of a tiny run from its command line to its last line."""

from pathlib import Path

import pytest

from cosmos_scale.cli.main import main
from cosmos_scale.cli.plan import GPUS
from cosmos_scale.config.load import dump_config
from cosmos_scale.profiling.machine import MACHINES
from cosmos_scale.testing.tiny import tiny_config


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    train = {"global_batch": 32, "schedule_steps": 100}
    path.write_text(dump_config(tiny_config(precision="bf16", zero={"stage": 2}, train=train)))
    return path


def test_the_kinds_of_gpus_are_those_of_the_machines() -> None:
    assert set(GPUS) == set(MACHINES)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "h100", "--nodes", "3", "--gpus", "5"], "train.global_batch"),
        (["--gpu", "h100", "zero.stage=9"], "zero.stage"),
        (["--gpu", "h100", "precision=fp16"], "plan with bf16"),
        (["--machine", "nowhere.json"], "nowhere.json: No such file or directory"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_line(
    run_file: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(run_file), *arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("cosmos-scale plan: ")
    assert said in line


@pytest.mark.parametrize("options", [("--calibrate",), ("--gpu", "h100", "--json")])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    run_file: Path, options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    for file, said in (("folder", "is a folder; rule: name a file"), ("gone/file", "cannot be written: No such file")):
        assert main(["plan", str(run_file), *options, str(tmp_path / file)]) == 2
        assert capsys.readouterr().err.startswith(f"cosmos-scale plan: {tmp_path / file}: {said}")
    assert not (tmp_path / "gone").exists()
    assert main(["plan", str(run_file), *options, str(run_file)]) == 2  # its own run's file
    assert f"{run_file}: is there, and is no " in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_planned(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One block a tower and few views: what takes the time is the host's calls of seventeen counted steps."""
    model = [f"model.{tower}.layers=1" for tower in ("vision", "text")]
    few = [*model, "data.views.local_crops=1", "data.captions.count=3"]
    assert main(["plan", str(run_file), *few, "--nodes", "2", "--gpu", "a100-40"]) == 0
    output = capsys.readouterr().out
    head, *_, last = output.splitlines()
    assert head.startswith("run run on 16 x A100 SXM 40 GB (2 x 8")
    assert last.startswith("  at 1,024 GPUs the loss is ")
    for said in ("batch 32 = 16 x 2", "memory of a rank", "fits: ", "largest batch a GPU: ", "TFLOP needed"):
        assert said in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "h100", "--out", "folder"], "--out: names the folder of --sweep's files"),
        (["--calibrate", "machine.json", "--sweep"], "--calibrate: plans nothing"),
        (["--calibrate", "machine.json", "--gpu", "h100"], "not allowed with argument"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    run_file: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", str(run_file), *arguments])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
