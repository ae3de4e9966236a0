"""Folders that are closed to the user: their shards are not left out, and their index is not called missing."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.config import SourceConfig
from cosmos_scale.data.shards.index import index_shards, open_index
from cosmos_scale.data.shards.patterns import parse_pattern
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import sample, write_shard, write_shards


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wildcards pass over such a folder, and its shards would be in no index."""
    for name in "ab":
        write_shards(tmp_path / name, [2])
    (tmp_path / "notes.txt").touch()
    pattern = parse_pattern(str(tmp_path / "*" / "*.tar"))
    assert pattern.list_names() == ["a/00000.tar", "b/00000.tar"]
    listed = os.scandir

    def closed(path: str) -> Any:
        if Path(path).name == "b":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return listed(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", closed)
        with pytest.raises(UserError, match=r"/b: cannot be listed: Permission denied; .*\{a,b\}"):
            index_shards(str(tmp_path / "*" / "*.tar"), tmp_path, progress=False)
        assert parse_pattern(str(tmp_path / "a" / "*.tar")).list_names() == ["00000.tar"]
    (tmp_path / "c").symlink_to("unmounted")
    with pytest.raises(UserError, match=r"/c: cannot be listed: it is a link that leads nowhere"):
        pattern.list_names()
    assert parse_pattern(str(tmp_path / "{a,b}" / "*.tar")).list_names() == ["a/00000.tar", "b/00000.tar"]


def test_an_index_that_is_closed_to_the_user_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "0.tar", [sample(0)])
    out = tmp_path / "closed"
    index_shards(str(tmp_path), out, workers=1, progress=False)

    def closed(path: str, *_: object) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", closed)
        patch.setattr("cosmos_scale.data.shards.summary.read_whole", closed)
        with pytest.raises(UserError, match=r"closed/index\.json: index cannot be read: Permission denied$"):
            open_index(SourceConfig(name="test", shards=str(tmp_path), index=str(out)))
