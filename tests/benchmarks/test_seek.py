"""What a seek in 30 million samples costs in files and bytes, as its benchmark counts; times are not tested."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.seek import SAMPLES, count
from tests.benchmarks.test_benchmarks import run

pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's count of bytes read")


def test_reaching_90_percent_opens_few_files_and_reads_no_more_than_a_mebibyte(tmp_path: Path) -> None:
    file = tmp_path / "seek.json"
    run("-m", "benchmarks.seek", "--rounds", "1", "--json", str(file))
    figures = {row["name"]: row["value"] for row in json.loads(file.read_text())}
    names = ["files", "bytes", "sample", "batch", "pass_shard", "pass"]
    assert list(figures) == [f"seek_{name}" for name in names]
    # Three summaries and a table at least, which proves that the counters count; 20 bytes a shard and 40 a sample.
    assert 4 <= figures["seek_files"] <= 10
    assert 6388 * 20 + SAMPLES * 40 <= figures["seek_bytes"] <= 2**20
    assert all(value > 0 for value in figures.values())


def test_counts_are_of_what_is_opened_read_and_mapped(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second.npy"
    first.write_bytes(bytes(300_000))
    np.save(second, np.zeros(50_000))
    read = count(tmp_path, first.read_bytes)
    assert read.opened == ["first"]
    assert 300_000 <= read.bytes_read <= 310_000  # the counter itself reads a little
    mapped = count(tmp_path, lambda: np.load(second, mmap_mode="r")[7])
    assert set(mapped.opened) == {"second.npy"}
    assert 400_000 <= mapped.bytes_read <= 410_000
    assert count(tmp_path, lambda: None).bytes_read <= 10_000
