"""Where a shard's tar ends before its file: another tar behind it, or zeros in the place of what has not come."""

from pathlib import Path

import pytest

from cosmos_scale.config import DataConfig, SourceConfig
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.data.shards.reader import BLOCK
from cosmos_scale.data.shards.scan import scan_shard
from cosmos_scale.data.tools.verify import verify_shards
from cosmos_scale.testing.shard_files import picture
from tests.data.shards.test_reader import write_tar

TXT = b"a photo of a thing"


def test_a_tar_behind_the_end_of_another_is_said(tmp_path: Path) -> None:
    """As `cat 0.tar 1.tar` joins them: no reader of tars goes on behind the first end."""
    one = write_tar(tmp_path / "0.tar", [("a.jpg", picture(0)), ("a.txt", TXT)])
    size = one.stat().st_size
    assert scan_shard(one).torn is None
    joined = tmp_path / "1.tar"
    joined.write_bytes(one.read_bytes() * 2)
    scan = scan_shard(joined)
    assert len(scan.entries) == 1
    where = f"from byte {size} on, behind the end of the archive"
    assert scan.torn == f"unread end: more data {where}, which no reader reaches"
    joined.write_bytes(one.read_bytes() + bytes(BLOCK * 3))
    assert scan_shard(joined).torn is None


@pytest.mark.parametrize("whole", [1, 2])
def test_a_download_that_is_not_complete_is_said(whole: int, tmp_path: Path) -> None:
    """Downloaders reserve the whole file: what has not come yet is zeros, and a tar ends at zeros."""
    key = [f"{number}" for number in range(12)]
    members = [(f"{k}.{kind}", data) for k in key for kind, data in (("jpg", picture(0)), ("txt", TXT * 1000))]
    path = write_tar(tmp_path / "0.tar", members)
    data, start = path.read_bytes(), scan_shard(path).entries[whole].start
    path.write_bytes(data[:start] + bytes(len(data) - start))
    zeros = f"incomplete: {len(data) - start:,} bytes of zeros from byte {start} on"
    scan = scan_shard(path)
    assert (len(scan.entries), scan.torn) == (whole, f"{zeros}, as in a download that was not completed")
    report = index_shards(str(tmp_path), None, workers=1, progress=False)
    assert (report.torn, report.samples) == (1, whole)
    verdict = verify_shards(
        DataConfig(sources=(SourceConfig(name="s", shards=str(tmp_path)),)), workers=1, progress=False
    )
    assert (verdict.shards_damaged, zeros in verdict.describe(None)) == (1, True)
