"""Patterns that mean too much are refused before they are expanded; tars that a folder does not mean are named."""

from pathlib import Path

import pytest

from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.data.shards.patterns import parse_pattern
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import write_shards


@pytest.mark.parametrize("pattern", ["/none/{000000..99999999999}.tar", "https://host/{0..9999}/{9999..0}.tar"])
def test_a_range_past_any_dataset_is_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="its braces mean more than 10,000,000 shards"):
        parse_pattern(pattern).list_names()


def test_a_long_range_with_a_wide_step_is_not() -> None:
    assert len(parse_pattern("https://host/{0..20000000..10000000}.tar").list_names()) == 3


def test_a_folder_means_its_shards_that_are_not_hidden(tmp_path: Path) -> None:
    for name in ("0.tar", "._0.tar"):  # macOS lays the second one beside the first on foreign disks
        (tmp_path / name).touch()
    assert parse_pattern(str(tmp_path)).list_names() == ["0.tar"]


def test_tars_that_a_folder_does_not_mean_are_counted_and_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [2])
    report = index_shards(str(folder), None, workers=1, progress=False)
    assert (report.passed_over, "not indexed" in report.describe()) == ([], False)
    shard = (folder / "00000.tar").read_bytes()
    for name in ("1.TAR", "sub/2.tar", "sub/3.tar.gz", "sub/notes.txt", "sub/deep/4.tar", ".5.tar", "6.tar.index"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(shard)
    report = index_shards(str(folder), None, workers=1, progress=False)
    assert (report.samples, report.shards) == (2, 1)
    assert report.passed_over == ["1.TAR", "sub/2.tar", "sub/3.tar.gz"]
    said = (
        "3 other tars in the folder (1.TAR, sub/2.tar, sub/3.tar.gz) are not indexed: a folder means its own .tar files"
    )
    assert said in report.describe()
    (folder / "00000.tar").unlink()
    with pytest.raises(UserError, match=r"no \.tar shards match; it holds 1\.TAR$"):
        index_shards(str(folder), None, workers=1, progress=False)
    assert index_shards(str(folder / "1.TAR"), folder, workers=1, progress=False).passed_over == []
