"""The benchmarks run as promised and write what they promise; how fast anything is, no test says."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.report import Figure, argument_parser, report
from tests.conftest import REPOSITORY

BENCHMARKS = sorted(
    path.stem for path in REPOSITORY.glob("benchmarks/*.py") if '__name__ == "__main__"' in path.read_text()
)


def run(*arguments: str, cwd: Path = REPOSITORY) -> str:
    finished = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=200, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_shows_an_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        import_module(f"benchmarks.{name}").main()
    assert end.value.code == 0
    help_text = capsys.readouterr().out
    assert "--json FILE" in help_text
    assert f"python benchmarks/{name}.py" in help_text.partition("examples:")[2]


def test_make_bench_runs_every_benchmark() -> None:
    finished = subprocess.run(
        ["make", "--dry-run", "bench", "VENV=nowhere"],
        cwd=REPOSITORY,
        # A make that runs the tests would make this one speak of folders too.
        env={name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))},
        capture_output=True,
        text=True,
        check=True,
    )
    recipe = finished.stdout[finished.stdout.index("mkdir -p bench_out") :]
    listed = subprocess.run(
        ["sh", "-c", recipe.replace("nowhere/bin/python", "echo RUNS")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [f"RUNS benchmarks/{name}.py --json bench_out/{name}.json" for name in BENCHMARKS]
    assert [line for line in listed.stdout.splitlines() if line.startswith("RUNS")] == expected


def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.json").write_text("[]")
    parser = argument_parser("loss", "", ())
    for file, why in ((tmp_path, "is a folder"), (tmp_path / "old.json" / "new.json", str(tmp_path / "old.json"))):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(["--json", str(file)])
        assert ended.value.code == 2
        assert why in capsys.readouterr().err
    for file in (tmp_path / "old.json", tmp_path / "new" / "new.json", Path("/dev/stdout")):
        assert parser.parse_args(["--json", str(file)]).json == file
    assert (tmp_path / "old.json").read_text() == "[]"


def test_report_prints_a_table_and_writes_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "figures.json"
    report("Speeds", [Figure("a_speed", 1234.5678, "samples/s", "of a"), Figure("b_share", 0.25, "of b", "b")], file)
    rows = json.loads(file.read_text())
    assert [list(row) for row in rows] == [["name", "value", "unit", "note"]] * 2
    assert [(row["name"], row["value"], row["unit"]) for row in rows] == [
        ("a_speed", 1234.5678, "samples/s"),
        ("b_share", 0.25, "of b"),
    ]
    assert rows[0]["note"].startswith("of a; ")
    assert "CPU cores" in rows[0]["note"]
    assert " thread" in rows[0]["note"]
    table = capsys.readouterr().out
    for text in ("Speeds", "a_speed", "1,235", "samples/s", "b_share", "0.25"):
        assert text in table


def test_the_step_benchmark_runs_from_another_folder(tmp_path: Path) -> None:
    """One step of the demo, from shards to figures: names, units, and shares that leave no time out."""
    file = tmp_path / "step.json"
    output = run(
        str(REPOSITORY / "benchmarks" / "step.py"), *f"--model demo --steps 1 --json {file}".split(), cwd=tmp_path
    )
    figures = {row["name"]: row for row in json.loads(file.read_text())}
    parts = ["data", "student", "teacher", "loss", "backward", "update"]
    assert list(figures) == ["step_demo_samples_per_second", *(f"step_demo_share_{part}" for part in parts)]
    assert all(name in output for name in figures)
    speed, *shares = figures.values()
    assert speed["unit"] == "samples/s"
    assert speed["value"] > 0
    assert "median of 1 steps" in speed["note"]
    assert all(0 <= share["value"] <= 1 for share in shares)
    assert sum(share["value"] for share in shares) == pytest.approx(1.0, abs=1e-9)  # float64 rounding of six terms
