"""A refused indexing leaves an index that is there as it was, and says in a file of its own what it found."""

from pathlib import Path

import pytest

from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.data.shards.members import ScanRules
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import sample, write_shard


def test_a_refused_indexing_leaves_an_index_and_its_report(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [sample(0), {"__key__": "lonely", "jpg": b"\xff\xd8\xff"}])
    index_shards(str(tmp_path), None, workers=1, progress=False)
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for key in ("other", "another"):
        with pytest.raises(UserError, match=r"no usable sample in 1 shard; see .*rejected\.refused\.jsonl"):
            index_shards(str(tmp_path), None, rules=ScanRules((key,)), workers=1, progress=False)
    refused = tmp_path / "rejected.refused.jsonl"
    assert len(refused.read_text().splitlines()) == 2
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file != refused} == kept
    index_shards(str(tmp_path), None, workers=1, progress=False)
    assert not refused.exists()


def test_shards_that_would_share_a_table_are_refused(tmp_path: Path) -> None:
    shards, out = tmp_path / "shards", tmp_path / "out"
    shards.mkdir()
    for number, name in enumerate(("a", "a.tar", "b")):
        write_shard(shards / name, [sample(number)])
    said = r"shards/a and .*shards/a\.tar: both would have the table a\.index\.npy in one index; rule: rename one"
    with pytest.raises(UserError, match=said):
        index_shards(str(shards / "*"), out, workers=1, progress=False)
    assert list(out.iterdir()) == []
    index_shards(str(shards / "{a,b}"), out, workers=1, progress=False)
    kept = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(UserError, match=r"shards/a\.tar and .*shards/a: both would have the table a\.index\.npy"):
        index_shards(str(shards / "a.tar"), out, workers=1, progress=False)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == kept
    assert index_shards(str(shards / "a.tar"), tmp_path / "other", workers=1, progress=False).samples == 1
