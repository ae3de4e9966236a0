"""What is said of samples that the index leaves out, and what an inspection leaves behind where it fails."""

from pathlib import Path

import pytest

from cosmos_scale.cli import main as cli
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.testing.runs import write_run
from cosmos_scale.testing.shard_files import picture, sample, write_shard, write_shards
from tests.data.tools.test_inspect import read_json, run


def test_an_inspection_that_fails_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path / "shards", [3])
    index_shards(str(folder), None, progress=False)
    new, old = tmp_path / "new", tmp_path / "old"
    old.mkdir()
    for out in (new, old):
        arguments = ["data", "inspect", str(folder), "--first", "1000000", "--out", str(out), "--quiet"]
        assert cli.main(arguments) == 2
        assert "--first 1000000" in capsys.readouterr().err
    assert (new.exists(), old.exists()) == (False, True)


def test_what_the_index_leaves_out_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [{**sample(number), "png": picture(number, "PNG")} for number in range(5)]
    members[0]["jpg"] = members[1]["jpg"] = b"no picture"
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shard(shards / "0.tar", members)
    index_shards(str(shards), None, progress=False)
    found = read_json(capsys, shards, "--out", tmp_path / "out")
    assert (found["samples"], found["not_in_index"]) == (3, {"samples": 2, "pictures": 3, "torn": 0})
    printed = run(capsys, shards, "--out", tmp_path / "out")
    assert "not in the index, so never read: 2 samples and 3 second pictures (rejected.jsonl)" in printed


def test_what_lies_behind_the_end_of_a_shard_is_told_by_inspection_and_at_a_runs_start(
    tmp_path: Path, scenes: SceneShards, capsys: pytest.CaptureFixture[str]
) -> None:
    joined = tmp_path / "joined"
    joined.mkdir()
    (joined / "0.tar").write_bytes(2 * (scenes.train / "train-00000.tar").read_bytes())  # as `cat` joins tars
    assert index_shards(str(joined), None, progress=False).torn == 1
    said = "not in the index, so never read: what lies behind the break of 1 shard (rejected.jsonl)"
    assert said in run(capsys, joined, "--out", tmp_path / "out")
    source = f"data.sources=[{{name: joined, shards: '{joined}'}}]"
    assert cli.main(["train", "--dry-run", str(write_run(tmp_path, scenes)), source]) == 0
    shown = capsys.readouterr()
    assert shown.err.count(f"warning: {said}") == 1
    assert said in " ".join(shown.out.split())
