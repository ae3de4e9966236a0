"""Shards that are not files of this machine: the same samples as from files, few requests, and what goes wrong."""

import errno
import json
import os
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from cosmos_scale import files
from cosmos_scale.cli.main import main
from cosmos_scale.config import RemoteConfig, SourceConfig
from cosmos_scale.data.samples.sample import UnreachableShard
from cosmos_scale.data.shards import table
from cosmos_scale.data.shards.index import MergedIndex, index_shards, open_sources
from cosmos_scale.data.shards.reader import BLOCK, CLOSE, ShardReader
from cosmos_scale.data.shards.scan import scan_shard
from cosmos_scale.data.training.loader import TrainLoader
from cosmos_scale.data.training.lost import check_shards
from cosmos_scale.data.training.order import EpochOrder
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.gallery import Gallery
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.testing.shard_files import open_folder, picture, sample, shards_config, write_shard, write_shards
from tests.data.web_server import Fault, WebServer, web_server

COUNTS = [5, 4, 6]
SAMPLES = sum(COUNTS)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", COUNTS)


@pytest.fixture
def server(shards: Path, tmp_path: Path) -> Iterator[WebServer]:
    with web_server(shards, tmp_path / "log") as running:
        yield running


def open_remote(pattern: str, index: Path | str | None) -> MergedIndex:
    return open_sources([SourceConfig(name="test", shards=pattern, index=None if index is None else str(index))])


def quick(**keys: Any) -> RemoteConfig:
    return RemoteConfig.model_validate({"backoff_s": 0.01, "timeout_s": 5.0, **keys})


def check_all(index: MergedIndex, remote: RemoteConfig) -> None:
    """Every sample is the one that was written, byte for byte, in the order of training."""
    reader = ShardReader(remote)
    reader.check(index.shard_files())
    for number in EpochOrder(index.source_shards(), 0, 8).visits(0, np.arange(SAMPLES)).samples.tolist():
        image, document = reader.read(index.locate(number))
        assert image == sample(number)["jpg"]
        assert document == json.loads(sample(number)["json"])
    reader.close()


def test_ranges_bring_the_samples_and_no_more(shards: Path, server: WebServer) -> None:
    index = open_remote(f"{server.url}/{{00000..00002}}.tar", shards)
    check_all(index, quick())
    probe, *requests = server.requests()
    assert (probe.range, probe.sent) == (f"bytes=0-{BLOCK - 1}", BLOCK)  # the look for the source
    assert len(requests) == SAMPLES  # picture and text come together
    assert all(request.status == 206 for request in requests)
    needed = 0
    for number in range(SAMPLES):
        entry = index.locate(number).entry
        needed += max(entry.image_offset + entry.image_size, entry.text_offset + entry.text_size) - entry.start
    assert sum(request.sent for request in requests) == needed
    assert len({request.client for request in requests}) == 1  # over one connection


def test_members_that_lie_apart_are_asked_for_apart(tmp_path: Path) -> None:
    for name, between, expected in (("near", CLOSE // 2, 1), ("far", 2 * CLOSE, 2)):
        folder = tmp_path / name
        folder.mkdir()
        write_shard(folder / "0.tar", [{"__key__": "a", "jpg": picture(0), "jxl": bytes(between), "txt": b"x"}])
        index_shards(str(folder), None, workers=1, progress=False)
        with web_server(folder, tmp_path / "log") as server:
            reader = ShardReader(quick())
            location = open_remote(f"{server.url}/0.tar", folder).locate(0)
            assert reader.read(location) == (picture(0), {"caption": "x"})
            assert len(server.requests()) == expected
            reader.close()


def test_a_json_without_caption_comes_with_its_txt_in_one_request(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    members = {"json": b'{"url": "x"}', "png": picture(0, "PNG"), "txt": b"a cat"}
    write_shard(tmp_path / "s" / "0.tar", [{"__key__": key, **members} for key in "ab"])
    index_shards(str(tmp_path / "s"), None, workers=1, progress=False)
    with web_server(tmp_path / "s", tmp_path / "log") as server, closing(ShardReader(quick())) as reader:
        index = open_remote(f"{server.url}/0.tar", tmp_path / "s")
        for number in range(2):
            assert reader.read(index.locate(number)) == (members["png"], {"url": "x", "caption": "a cat"})
        assert len(server.requests()) == 2


def test_a_server_without_ranges_sends_each_shard_once(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with web_server(shards, tmp_path / "log", ranges=False) as server:
        index = open_remote(f"{server.url}/{{00000..00002}}.tar", shards)
        with pytest.raises(
            UserError, match=r"data\.remote\.cache: null; must name a folder: http://.*comes whole only"
        ):
            ShardReader(quick()).check(index.shard_files())
        check_all(index, quick(cache=str(tmp_path / "cache")))
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{server.url}: serves no byte ranges, so that whole shards are kept in ")
        whole = [request.path for request in server.requests() if request.range is None]
        assert sorted(whole) == ["/00000.tar", "/00001.tar", "/00002.tar"]
        assert len(server.requests()) == 3 + 2  # each reader asked for a range once
        check_all(index, quick(cache=str(tmp_path / "cache")))  # a new reader, as in another process
        assert len(server.requests()) == 3 + 3


@pytest.mark.parametrize("kind", ["shards", "pipe", "memory", "file", "memory shards"])
def test_other_places_give_the_same_samples(shards: Path, tmp_path: Path, server: WebServer, kind: str) -> None:
    cache = {"cache": str(tmp_path / "cache")}
    pattern, remote = {
        "shards": (f"{server.url}/{{00000..00002}}.tar", quick(fetch="shards", **cache)),
        "pipe": (f"pipe:cat {shards}/{{00000..00002}}.tar", quick(**cache)),
        "memory": ("memory://m", quick()),
        "memory shards": ("memory://m/*.tar", quick(fetch="shards", **cache)),
        "file": (f"file://{shards}", quick()),
    }[kind]
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe({f"/m/{path.name}": path.read_bytes() for path in shards.glob("*.tar")})
    check_all(open_remote(pattern, shards), remote)
    filesystem.rm("/m", recursive=True)
    if kind == "shards":
        assert [request.range for request in server.requests()] == [f"bytes=0-{BLOCK - 1}", None, None, None]
    assert len(list((tmp_path / "cache").glob("*.shard"))) == (0 if kind in ("memory", "file") else 3)


@pytest.mark.parametrize("fault", ["500", "drop", "cut", "wrong", "hang"])
@pytest.mark.parametrize("fetch", ["parts", "shards"])
def test_every_tenth_request_fails_and_nothing_is_lost(shards: Path, tmp_path: Path, fault: Fault, fetch: str) -> None:
    every = 10 if fetch == "parts" else 2
    with web_server(shards, tmp_path / "log", fail_every=every, fault=fault) as server:
        index = open_remote(f"{server.url}/{{00000..00002}}.tar", shards)
        timeout_s = 0.5 if fault == "hang" else 20.0
        remote = quick(fetch=fetch, cache=str(tmp_path / "cache"), timeout_s=timeout_s, retries=4)
        check_all(index, remote)
        asked = len(server.requests())
        needed = 1 + (SAMPLES if fetch == "parts" else len(COUNTS))  # one more looks for the source
        if fault == "wrong" and fetch == "shards":  # whole shards are asked for without a range
            assert asked == needed
        else:  # on a busy machine one more request may run out of time
            assert asked == needed + asked // every or (fault == "hang" and asked > needed)
            assert asked // every >= 1


def test_a_server_that_dies_loses_its_shards(shards: Path, tmp_path: Path, server: WebServer) -> None:
    index = open_remote(f"{server.url}/{{00000..00002}}.tar?token=secret", shards)
    reader = ShardReader(quick(retries=2))
    reader.check(index.shard_files())
    assert reader.read(index.locate(0))[0] == picture(0)
    server.stop()
    for _ in range(2):
        with pytest.raises(UnreachableShard, match="Connection refused") as lost:
            reader.read(index.locate(0))
        assert (lost.value.source, lost.value.shard) == ("test", f"{server.url}/00000.tar?***")
        assert "secret" not in str(lost.value)
        assert str(lost.value).startswith(f"{server.url}/00000.tar?***: shard of source test cannot be opened any more")


def test_a_server_that_hangs_is_left_after_all_tries(shards: Path, tmp_path: Path) -> None:
    with web_server(shards, tmp_path / "log", fail_every=1, fault="hang") as server:
        index = open_remote(f"{server.url}/{{00000..00002}}.tar", shards)
        reader = ShardReader(quick(retries=2, timeout_s=0.5))
        for _ in range(2):
            with pytest.raises(UnreachableShard, match=r"no answer for 0\.5 s"):
                reader.read(index.locate(0))
        assert len(server.requests()) == 3  # a lost shard is not asked for again
        with pytest.raises(UserError, match=r"shard of source test cannot be opened: no answer for 0\.5 s"):
            ShardReader(quick(retries=0, timeout_s=0.5)).check(index.shard_files())


def test_what_was_never_there_is_an_error_at_the_start(shards: Path, server: WebServer) -> None:
    for folder in (f"{server.url}/elsewhere", f"file://{shards}/elsewhere"):
        index = open_remote(f"{folder}/{{00000..00002}}.tar", shards)
        with pytest.raises(UserError, match=r"00000\.tar: shard of source test cannot be opened: not found") as error:
            ShardReader(RemoteConfig()).check(index.shard_files())
        assert not isinstance(error.value, UnreachableShard)
    assert len(server.requests()) == 1  # a shard that was never there is not waited for
    (shards / "00001.tar").unlink()  # of a remote source only the first shard is looked for
    index = open_remote(f"{server.url}/{{00000..00002}}.tar", shards)
    reader = ShardReader(quick(retries=2))
    reader.check(index.shard_files())
    with pytest.raises(UnreachableShard, match="not found"):
        reader.read(index.locate(5))
    local = open_folder(shards)
    with pytest.raises(UserError, match=r"00001\.tar: shard of source test cannot be opened: No such file"):
        ShardReader().check(local.shard_files())
    known_to_be_lost = "00001"
    ShardReader().check(file for file in local.shard_files() if known_to_be_lost not in file.shown)


@pytest.mark.parametrize("kind", ["http", "file", "pipe"])
def test_a_shard_of_another_size_is_lost(shards: Path, tmp_path: Path, server: WebServer, kind: str) -> None:
    pattern = {"http": f"{server.url}/{{00000..00002}}.tar", "file": f"file://{shards}", "pipe": ""}[kind]
    index = open_remote(pattern or f"pipe:cat {shards}/{{00000..00002}}.tar", shards)
    for count in (1, 9):
        write_shard(shards / "00000.tar", [sample(number) for number in range(count)])
        reader = ShardReader(quick(retries=1, cache=str(tmp_path / "cache")))
        found = (shards / "00000.tar").stat().st_size if (kind, count) != ("pipe", 9) else "more than"
        with pytest.raises(UnreachableShard, match=rf"00000\.tar.*: has {found}.* bytes, but its index was made"):
            reader.read(index.locate(0))


def test_a_file_that_comes_back_in_time_was_not_lost(shards: Path) -> None:
    index = open_folder(shards)
    reader = ShardReader(quick(retries=8, backoff_s=0.02))
    hidden = shards / "00000.tar"
    hidden.rename(shards / "away")
    timer = threading.Timer(0.2, (shards / "away").rename, [hidden])
    timer.start()
    assert reader.read(index.locate(0))[0] == picture(0)
    timer.join()
    reader.close()
    hidden.unlink()
    reader = ShardReader(quick(retries=2))
    for _ in range(2):
        with pytest.raises(UnreachableShard, match="No such file or directory"):
            reader.read(index.locate(0))
    write_shards(shards, COUNTS)
    with pytest.raises(UnreachableShard):  # even where the shard is back: the ranks have agreed
        reader.read(index.locate(0))


def test_a_failing_read_of_an_open_file_is_tried_again_and_then_lost(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = open_folder(shards).locate(0)
    tries = []

    def fail(descriptor: int, size: int, offset: int) -> bytes:
        tries.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        raise OSError(errno.EIO, "Input/output error")  # as of a breaking disk

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UnreachableShard, match="Input/output error"):
        ShardReader(quick(retries=2)).read(location)
    assert tries == [location.shard] * 3
    assert not [link for link in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{link}") == tries[0]]


@pytest.mark.parametrize("kind", ["http", "file", "pipe"])
def test_remote_shards_are_indexed_like_files(shards: Path, tmp_path: Path, server: WebServer, kind: str) -> None:
    pattern = {
        "http": f"{server.url}/{{00000..00002}}.tar?token=secret",
        "file": f"file://{shards}",
        "pipe": f"pipe:cat {shards}/{{00000..00002}}.tar",
    }[kind]
    with pytest.raises(UserError, match=r"^--out: must name a folder of this machine for the index, since ") as error:
        index_shards(pattern, None, progress=False)
    assert "secret" not in str(error.value)
    out = tmp_path / "out"
    assert main(["data", "index", pattern, "--out", str(out), "--workers", "2", "--quiet"]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["00000.index.npy", "00001.index.npy", "00002.index.npy", "index.json"]
    for name in names:
        assert (out / name).read_bytes() == (shards / name).read_bytes()
    if kind == "http":
        assert [request.range for request in server.requests()] == [None] * 3  # each shard once, whole
    with pytest.raises(UserError, match=r"1 shard is not in .*, the first is 00003\.tar; run .*--out"):
        open_remote(
            pattern.replace("00002", "00003") if kind != "file" else f"file://{shards}/{{00000..00003}}.tar", out
        )


def test_an_indexing_that_broke_off_goes_on_where_it_was(shards: Path, tmp_path: Path, server: WebServer) -> None:
    write_shard(shards / "00001.tar", [sample(5), {"__key__": "no_text", "jpg": picture(0)}])
    index_shards(str(shards), None, workers=1, progress=False)
    pattern, out = f"{server.url}/{{00000..00002}}.tar", tmp_path / "out"
    (shards / "00002.tar").rename(tmp_path / "away.tar")
    with pytest.raises(UserError, match=r"00002\.tar: cannot be read: not found"):
        index_shards(pattern, out, workers=1, progress=False)
    with pytest.raises(UserError, match=r"no index at .*out/index\.json; run .*--out"):
        open_remote(pattern, out)
    with (out / "unfinished.jsonl").open("a") as file:
        file.write('["00002.tar", 4, 10')  # killed while writing
    (tmp_path / "away.tar").rename(shards / "00002.tar")
    report = index_shards(pattern, out, workers=1, progress=False)
    assert (report.shards, report.samples, report.rejected.total()) == (3, 12, 1)
    assert [request.path[1:] for request in server.requests() if request.status == 200] == [
        "00000.tar", "00001.tar", "00002.tar",
    ]  # fmt: skip
    for path in out.iterdir():
        assert path.read_bytes() == (shards / path.name).read_bytes()
    index_shards(pattern, out, workers=1, progress=False)  # a finished index is made anew, after a look at a shard
    assert [request.sent for request in server.requests()[4:5]] == [BLOCK]
    assert len(server.requests()) == 8


def test_an_index_may_lie_at_a_url_too(shards: Path, tmp_path: Path, server: WebServer) -> None:
    beside = open_remote(f"{server.url}/{{00000..00002}}.tar", None)
    assert beside.fingerprint() == open_folder(shards).fingerprint()
    check_all(beside, quick())
    tables = [request.path for request in server.requests() if request.path.endswith(".npy")]
    assert sorted(tables) == [f"/{shard:05d}.index.npy" for shard in range(3)]  # each table once
    check_all(
        open_remote(f"pipe:cat {shards}/{{00000..00002}}.tar", f"{server.url}/"), quick(cache=str(tmp_path / "c"))
    )
    with pytest.raises(UserError, match=r"elsewhere/index\.json\?\*\*\*: index cannot be read: not found"):
        open_remote(f"{server.url}/0.tar", f"{server.url}/elsewhere?token=secret")
    with pytest.raises(
        UserError, match=r"data source test: pipe: \.\.\. .*0\.tar: needs index, the folder of its index"
    ):
        open_remote("pipe:cat 0.tar", None)


def test_a_remote_shard_that_cannot_be_scanned_is_named(shards: Path, server: WebServer) -> None:
    with pytest.raises(UserError, match=r"^http://127.*/none\.tar\?\*\*\*: cannot be read: not found"):
        index_shards(f"{server.url}/none.tar?t=1", shards, workers=1, progress=False)
    with pytest.raises(UserError, match=r"^pipe: \.\.\. 0\.tar: cannot be read: the command failed with status 1"):
        scan_shard("pipe:false 0.tar", "pipe: ... 0.tar", quick(retries=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_are_those_of_files(shards: Path, tmp_path: Path, server: WebServer, workers: int) -> None:
    tokenizer = Tokenizer(16)
    expected = TrainLoader(shards_config(shards), open_folder(shards), tokenizer, 0, 1).batches(0)
    sources = [{"name": "test", "shards": f"{server.url}/{{00000..00002}}.tar", "index": str(shards)}]
    config = shards_config(shards, sources=sources, workers=workers, remote={"backoff_s": 0.01})
    index = open_sources(config.data.sources)
    batches = TrainLoader(config, index, tokenizer, 0, 1).batches(0)
    for batch, local in islice(zip(batches, expected, strict=True), 6):
        for left, right in zip(batch, local, strict=True):
            assert torch.equal(left, right)
    batches.close()
    expected.close()
    assert len({request.client for request in server.requests()}) == max(1, workers)  # a connection for each worker


def test_a_server_without_ranges_is_told_of_once(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The look for the shards before the run says it, and none of the loader's processes says it again."""
    with web_server(shards, tmp_path / "log", ranges=False) as server:
        sources = [{"name": "test", "shards": f"{server.url}/{{00000..00002}}.tar", "index": str(shards)}]
        remote = {"cache": str(tmp_path / "cache"), "backoff_s": 0.01}
        config = shards_config(shards, sources=sources, workers=2, remote=remote)
        index = open_sources(config.data.sources)
        check_shards(index, config, {}, resumed=False)
        with closing(TrainLoader(config, index, Tokenizer(16), 0, 1).batches(0)) as batches:
            assert len(list(islice(batches, 4))) == 4
    assert capfd.readouterr().err.count("serves no byte ranges") == 1


def test_a_gallery_is_read_through_the_cache(shards: Path, tmp_path: Path) -> None:
    remote = quick(cache=str(tmp_path / "cache"))
    pattern = f"pipe:cat {shards}/{{00000..00002}}.tar"
    make = partial(Gallery, captions_key="raw_caption", image_size=16, max_pixels=10**6)
    ours = list(make(open_remote(pattern, shards), remote=remote).batches(0, 1, 4))
    files = list(make(open_folder(shards)).batches(0, 1, 4))
    assert len(ours) == len(files) == 4
    for batch, local in zip(ours, files, strict=True):
        assert torch.equal(batch.images, local.images)
        assert batch.texts == local.texts


def test_an_index_is_read_again_where_its_file_system_fails_for_a_moment(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [None]
    read = files.read_regular

    def failing(path: str | Path) -> bytes:
        if Path(path).name == "index.json" and failures:
            failures.pop()
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path)

    monkeypatch.setattr(table, "read_regular", failing)
    assert len(open_sources([SourceConfig(name="test", shards=str(shards))], quick(retries=1))) == 15
    failures.append(None)
    with pytest.raises(UserError, match=r"index\.json: index cannot be read: Stale file handle"):
        open_sources([SourceConfig(name="test", shards=str(shards))], quick(retries=0))
