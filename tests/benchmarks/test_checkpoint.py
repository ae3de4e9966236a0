"""The checkpoint benchmark on a small model: it measures what it says; how fast anything is, no test says."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.test_benchmarks import run


def test_the_checkpoint_benchmark_runs(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.json"
    run("-m", "benchmarks.checkpoint", *f"--model tiny --rounds 1 --folder {tmp_path} --json {file}".split())
    figures = {row["name"]: row["value"] for row in json.loads(file.read_text())}
    assert next(iter(figures)) == "checkpoint_stall_ratio"
    ratio = figures["checkpoint_stall"] / figures["checkpoint_copy"]
    assert figures["checkpoint_stall_ratio"] == pytest.approx(ratio)
    assert min(value for name, value in figures.items() if name != "checkpoint_steps_lost") > 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.json"]
