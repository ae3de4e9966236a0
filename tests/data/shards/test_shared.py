"""Sources of a run that read the same shards: one line says so, since each sample counts once for each source."""

import os
import shutil
from pathlib import Path

import pytest

from cosmos_scale.cli.main import main
from cosmos_scale.config import SourceConfig
from cosmos_scale.data.shards.index import index_shards, open_sources
from cosmos_scale.data.shards.shared import describe_shared
from cosmos_scale.testing.shard_files import write_shards


def said(**patterns: str) -> str:
    sources = [SourceConfig(name=name, shards=pattern) for name, pattern in patterns.items()]
    return describe_shared(open_sources(sources).sources)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", [2, 3])


def test_a_folder_under_two_names_is_told(tmp_path: Path, shards: Path) -> None:
    assert said(a=str(shards)) == ""
    said_of_both = said(a=str(shards), b=str(shards / "{00000..00001}.tar"))
    assert said_of_both.startswith(
        f"data sources a and b have 2 shards in common, such as {shards}/00000.tar: an epoch"
    )
    (tmp_path / "link").symlink_to(shards)
    assert said(a=str(shards), b=str(tmp_path / "link")).startswith("data sources a and b have 2 shards in common, ")
    assert said(a=str(shards / "00000.tar"), b=str(shards / "00001.tar")) == ""
    three = said(a=str(shards), b=str(shards / "00001.tar"), c=str(tmp_path / "link"))
    assert three.startswith(
        f"data sources a and b have 1 shard in common, such as {shards}/00001.tar (and 2 more pairs "
    )


@pytest.mark.parametrize(("make", "shared"), [(os.symlink, True), (os.link, True), (shutil.copy, False)])
def test_links_are_told_and_copies_are_not(tmp_path: Path, shards: Path, make: object, shared: bool) -> None:
    other = tmp_path / "other"
    other.mkdir()
    make(shards / "00001.tar", other / "renamed.tar")  # type: ignore[operator]
    index_shards(str(other), None, workers=1, progress=False)
    assert bool(said(a=str(shards), b=str(other))) == shared


def test_shards_elsewhere_are_told_by_their_addresses(tmp_path: Path, shards: Path) -> None:
    sources = [
        SourceConfig(name=name, shards=f"http://{host}/00000.tar", index=str(shards))
        for name, host in (("a", "one"), ("b", "two"), ("c", "one"))
    ]
    assert describe_shared(open_sources(sources[:2]).sources) == ""
    assert describe_shared(open_sources(sources).sources).startswith("data sources a and c have 1 shard in common, ")


def test_verify_says_it_once(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.yaml"
    sources = "".join(f"  - {{name: {name}, shards: {shards}}}\n" for name in "ab")
    run.write_text(f"name: a\ndata:\n  sources:\n{sources}")
    assert main(["data", "verify", str(run), "--quiet", "--workers", "1"]) == 0
    said = f"warning: data sources a and b have 2 shards in common, such as {shards}/00000.tar: "
    assert capsys.readouterr().err.count(said) == 1
