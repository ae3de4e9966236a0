"""`data verify` of shards that were written anew after they were indexed: an old index is no damage."""

import json
from pathlib import Path

import pytest

from cosmos_scale.cli import main as cli
from cosmos_scale.testing.shard_files import sample, write_shard, write_shards


def test_a_sound_shard_written_anew_is_called_an_old_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path / "shards", [140, 5])
    write_shard(folder / "00000.tar", [sample(number) for number in range(3)])
    arguments = ["data", "verify", str(folder), "--quiet", "--workers", "1"]
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    assert "140 samples of an old index, which training refuses" in out
    assert "samples that training cannot use: 0 (0.00%)" in out
    assert "shards with a fault" not in out
    assert "00000.tar, whole shard: old index: has" in out
    assert cli.main([*arguments, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["outdated"], found["unreadable"], found["shards_damaged"]) == (140, 0, 0)


def test_a_shard_that_is_cut_off_stays_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path / "shards", [5])
    whole = (folder / "00000.tar").read_bytes()
    (folder / "00000.tar").write_bytes(whole[: len(whole) // 2])
    assert cli.main(["data", "verify", str(folder), "--quiet", "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "old index" not in out
    assert "shards with a fault of their own: 1" in out
