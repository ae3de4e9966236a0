"""Sources of a run that read the same shards: one line says so, since each sample counts once for each source."""

import os
import shutil
from pathlib import Path

import pytest

from cosmos_scale.cli.main import main
from cosmos_scale.config import SourceConfig
from cosmos_scale.data.shards.index import index_shards, open_sources
from cosmos_scale.data.shards.shared import describe_seen, describe_shared
from cosmos_scale.evaluation.gallery import Gallery
from cosmos_scale.testing.shard_files import sample, write_shard, write_shards


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


def test_verify_names_the_evaluation_on_shards_that_are_trained_on(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.yaml"
    galleries = "".join(
        f"  - {{kind: retrieval, name: {name}, every: 1, shards: {shards / pattern}}}\n"
        for name, pattern in (("same", ""), ("part", "00001.tar"))
    )
    run.write_text(f"name: a\ndata: {{sources: [{{name: a, shards: {shards}}}]}}\neval:\n{galleries}")
    assert main(["data", "verify", str(run), "--quiet", "--workers", "1"]) == 0
    errors = capsys.readouterr().err
    assert f"warning: eval.same: reads 2 shards that the run trains on, such as {shards}/00000.tar: " in errors
    assert f"warning: eval.part: reads 1 shard that the run trains on, such as {shards}/00001.tar: " in errors


@pytest.mark.parametrize("make", [None, os.symlink, os.link, shutil.copy])
def test_an_evaluation_on_shards_that_are_trained_on_is_told(tmp_path: Path, shards: Path, make: object) -> None:
    held = tmp_path / "held"
    held.mkdir()
    write_shard(held / "00000.tar", [sample(number) for number in range(10, 14)])
    index_shards(str(held), None, workers=1, progress=False)
    trained = open_sources([SourceConfig(name="a", shards=str(shards))]).sources

    def seen(pattern: Path, samples: int | None = None) -> str:
        index = open_sources([SourceConfig(name="held", shards=str(pattern))])
        gallery = Gallery(index, None, image_size=32, max_pixels=10**6, max_samples=samples)
        return describe_seen(trained, gallery.shard_files())

    assert seen(held) == ""
    if make is None:
        where = f"2 shards that the run trains on, such as {shards}/00000.tar"
        assert seen(shards).startswith(f"reads {where}: its numbers are of samples seen in training; rule: ")
        return
    make(shards / "00001.tar", held / "renamed.tar")  # type: ignore[operator]
    index_shards(str(held), None, workers=1, progress=False)
    assert seen(held).startswith(f"reads 1 shard that the run trains on, such as {held}/renamed.tar: ")
    assert seen(held, samples=4) == ""  # the first shard alone
    assert seen(held, samples=5) != ""
