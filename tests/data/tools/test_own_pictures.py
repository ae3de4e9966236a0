"""`data inspect` replaces its own pictures, and nobody else's."""

from pathlib import Path

import pytest
from PIL import Image

from cosmos_scale.cli import main as cli
from cosmos_scale.testing.shard_files import write_shards


@pytest.mark.parametrize("name", ["statistics.png", "views.png"])
@pytest.mark.parametrize("kind", ["picture", "text"])
def test_pictures_of_the_user_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    shards, out = write_shards(tmp_path / "shards", [3]), tmp_path / "out"
    out.mkdir()
    theirs = out / name
    if kind == "picture":
        Image.new("RGB", (8, 8)).save(theirs)
    else:
        theirs.write_text("a note")
    before = theirs.read_bytes()
    assert cli.main(["data", "inspect", str(shards), "--out", str(out), "--quiet", "--workers", "1"]) == 2
    said = f"{theirs}: is not a picture of `data inspect`; move it away, or name another folder with --out\n"
    assert capsys.readouterr().err.endswith(said)
    assert [path.read_bytes() for path in out.iterdir()] == [before]


def test_its_own_pictures_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, samples in (("a", 3), ("b", 5)):
        shards = write_shards(tmp_path / name, [samples])
        assert cli.main(["data", "inspect", str(shards), "--out", str(out), "--quiet", "--workers", "1"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["statistics.png", "views.png"]
