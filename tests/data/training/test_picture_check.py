"""Pictures past data.max_pixels are counted before a run; a source that has no other is refused."""

from pathlib import Path

import pytest

from cosmos_scale.config import DataConfig, SourceConfig
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.data.training.picture_check import check_pictures
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import open_folder, picture, write_shard


def shards_of(folder: Path, sides: list[int]) -> Path:
    folder.mkdir()
    samples = [
        {"__key__": f"{number:05d}", "jpg": picture(number, size=(side, side)), "json": b'{"caption": "a"}'}
        for number, side in enumerate(sides)
    ]
    write_shard(folder / "00000.tar", samples)
    index_shards(str(folder), None, workers=1, progress=False)
    return folder


def check(folder: Path, max_pixels: int) -> str:
    data = DataConfig(sources=[SourceConfig(name="test", shards=str(folder))], max_pixels=max_pixels)
    return check_pictures(open_folder(folder), data)


def test_pictures_past_the_limit_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shards_of(tmp_path / "s", [20, 20, 40, 20, 30])
    assert check(folder, 1600) == "5 pictures looked at, none exceeds data.max_pixels"
    assert capsys.readouterr().err == ""
    said = (
        "data source test: 2 of 5 pictures looked at exceed data.max_pixels 899 (the largest: 40 x 40): they count as "
    )
    assert check(folder, 899) == f"{said}damaged, and training stops at more than data.max_damaged 0.01"
    assert capsys.readouterr().err.startswith(said)
    with pytest.raises(
        UserError, match=r"5 of 5 pictures .* exceed data\.max_pixels 399 .*; rule: a larger data\.max_"
    ):
        check(folder, 399)
