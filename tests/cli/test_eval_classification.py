"""`cosmos-scale eval classification` on a checkpoint of a real run: tables, JSON, files, ranks, refusals."""

import json
import shutil
from pathlib import Path

import pytest

from cosmos_scale.cli import main as cli
from cosmos_scale.testing.runs import start_command
from cosmos_scale.testing.shard_files import picture
from tests.cli.dying_eval import DIED
from tests.evaluation.labelled import write_folders


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("pictures"), [5, 6, 4])


def command(checkpoints: Path, pictures: Path, *options: str) -> list[str]:
    data = ["--checkpoint", str(checkpoints), "--data", str(pictures)]
    return ["eval", "classification", *data, "--device", "cpu", *options]


def test_both_models_stand_in_one_table_and_in_lines_of_json(
    checkpoints: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(checkpoints, pictures, "--weights", "both", "--json")) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["weights"] for line in lines] == ["student", "teacher"]
    for line in lines:
        assert list(line)[:4] == ["checkpoint", "weights", "dataset", "data"]
        assert line["checkpoint"] == str(checkpoints / "step-00000002")
        assert (line["pictures"], line["classes"], line["pictures_left_out"]) == (15, 3, 0)
    assert cli.main(command(checkpoints, pictures, "--weights", "both")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for line in lines:
        figures = [f"{100 * line[key]:.2f} %" for key in ("top1", "top5", "mean_per_class")]
        assert f"{line['weights']} │ {figures[0]} │ {figures[1]} │ {figures[2]}" in shown
    assert "15 pictures, 3 classes; chance top-1: 33.33 %" in shown


def test_confusions_are_printed_and_written_for_each_model(
    checkpoints: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--weights", "both", "--confusions", "2", "--out", str(tmp_path / "out"), "--cache"]
    before = set(checkpoints.glob("features/*"))
    assert cli.main(command(checkpoints, pictures, *options)) == 0
    assert capsys.readouterr().out.count("worst confusions") == 2
    for which in ("student", "teacher"):
        assert sorted(path.name for path in (tmp_path / "out" / which).iterdir()) == [
            "confusions.csv",
            "confusions.png",
        ]
    assert len(set(checkpoints.glob("features/*")) - before) == 2


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_of_a_launcher_share_the_work_and_rank_0_prints_the_same_numbers(
    checkpoints: Path, pictures: Path, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    options = command(checkpoints, pictures, "--batch", "4", "--json")
    assert cli.main(options) == 0
    alone = capsys.readouterr().out
    with start_command("--local_rank=0", *options, ranks=ranks) as process:  # as the deepspeed launcher does
        finished = process.wait().require(0)
    assert finished.output == alone


def test_what_is_wrong_on_one_rank_is_told_once(checkpoints: Path, pictures: Path, tmp_path: Path) -> None:
    broken = write_folders(tmp_path, [1, 1])
    for file in broken.glob("*/*.jpg"):
        file.write_bytes(picture(0)[:100])
    for data, said in ((tmp_path / "none", "no such folder; rule: "), (broken, "none of its 2 pictures can be used")):
        with start_command(*command(checkpoints, data), ranks=2) as process:
            finished = process.wait().require(2)
        told = [line for line in finished.errors.splitlines() if line.startswith("cosmos-scale")]
        (line,) = told
        assert line.startswith(f"cosmos-scale eval classification: {data}: {said}")
        assert line.endswith("(rank 0)")
        assert "Traceback" not in finished.errors


def test_a_rank_that_is_gone_is_told_and_none_waits_for_it(checkpoints: Path, pictures: Path) -> None:
    options = command(checkpoints, pictures, "--batch", "4")
    with start_command(*options, ranks=2, program="tests.cli.dying_eval") as process:
        finished = process.wait()
    assert finished.statuses == [1, DIED]
    (line,) = [line for line in finished.errors.splitlines() if line.startswith("cosmos-scale")]
    assert line.startswith("cosmos-scale eval: rank 0 lost contact with another rank: ")
    assert "Traceback" not in finished.errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--split", "a.txt"], "--split: a.txt must be null where dataset is not sun397"),
        (["--batch", "200000"], "--batch: 200000 should be less than or equal to 100000"),
        (["--dataset", "pets"], "not the files of pets (Dataset not found); rule: pets is oxford-iiit-pet/"),
        (["--classes", "no_such_file"], "no_such_file: cannot be read: No such file or directory; rule: a text file"),
    ],
)
def test_refusals_are_one_line(
    checkpoints: Path, pictures: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(checkpoints, pictures, *options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("cosmos-scale eval classification: ")
    assert said in error
    assert error.count("\n") == 1


def test_pictures_are_not_written_among_the_classes(
    checkpoints: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, link = tmp_path / "data", tmp_path / "link"
    shutil.copytree(pictures, data)
    link.symlink_to(data)
    for out in (data, data / "results", link / "results"):
        assert cli.main(command(checkpoints, data, "--out", str(out))) == 2
        said = f"--out: {out} lies in --data {data}, where each folder is a class, with all pictures below it; rule: a "
        assert said in capsys.readouterr().err
    assert not (data / "results").exists()
    for out in (data / ".results", tmp_path / "data_results"):
        assert cli.main(command(checkpoints, data, "--out", str(out))) == 0
