"""The benchmark of loader processes runs and counts what a batch's handover sends; speeds are not tested."""

import json
from pathlib import Path

from benchmarks.loader_workers import numbers_of_workers
from tests.benchmarks.test_benchmarks import run


def test_numbers_of_workers_double_up_to_the_most() -> None:
    assert numbers_of_workers(1) == [0, 1]
    assert numbers_of_workers(2) == [0, 1, 2]
    assert numbers_of_workers(12) == [0, 1, 2, 4, 8, 12]


def test_a_batch_is_large_and_the_message_about_it_is_not(tmp_path: Path) -> None:
    file = tmp_path / "workers.json"
    run("-m", "benchmarks.loader_workers", *f"--photos 8 --batch 2 --most 2 --rounds 1 --json {file}".split())
    figures = {row["name"]: row["value"] for row in json.loads(file.read_text())}
    speeds = [f"loader_workers_{workers}_samples_per_second" for workers in (0, 1, 2)]
    sent = ["mb", "message_bytes", "ms", "copied_ms"]
    assert list(figures) == [*speeds, "loader_workers_scaling", *(f"loader_handover_{name}" for name in sent)]
    assert all(value > 0 for value in figures.values())
    # Two samples of two views of 224 and six of 96 pixels; captions and ids come on top.
    pixels = 2 * 3 * (2 * 224**2 + 6 * 96**2)
    assert pixels < 1e6 * figures["loader_handover_mb"] < 1.01 * pixels
    assert figures["loader_handover_message_bytes"] < 2048
