"""Copies of far shards that the local disk has damaged: batches stay the same, and each costs one download."""

import os
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch

from cosmos_scale.batch import Batch
from cosmos_scale.data.shards.index import open_sources
from cosmos_scale.data.training.loader import TrainLoader
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.testing.shard_files import open_folder, shards_config, write_shards
from tests.data.web_server import WebServer, web_server

COUNTS = [5, 4, 6]
STEPS = 6  # all samples are in these batches


def batches(shards: Path, server: WebServer, cache: Path, workers: int = 0) -> tuple[list[Batch], list[str]]:
    """Train's first batches through a cache, and the keys of the samples that counted as damaged."""
    sources = [{"name": "test", "shards": f"{server.url}/{{00000..00002}}.tar", "index": str(shards)}]
    remote = {"fetch": "shards", "cache": str(cache), "backoff_s": 0.01}
    config = shards_config(shards, sources=sources, workers=workers, remote=remote, max_damaged=0.5)
    log = cache.with_suffix(".jsonl")
    loader = TrainLoader(config, open_sources(config.data.sources), Tokenizer(16), 0, 1, log)
    with closing(loader.batches(0)) as stream:
        made = [Batch(*(tensor.clone() for tensor in batch)) for batch in islice(stream, STEPS)]
    return made, log.read_text().splitlines() if log.exists() else []


def equal(left: list[Batch], right: list[Batch]) -> bool:
    pairs = (pair for batch in zip(left, right, strict=True) for pair in zip(*batch, strict=True))
    return all(torch.equal(*pair) for pair in pairs)


def overwrite(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), data, place)


def flip_in_a_picture(copy: Path, place: int) -> None:
    """Change one bit, with which the picture decodes still, but not to the same pixels."""
    overwrite(copy, place, bytes([copy.read_bytes()[place] ^ 1]))


DAMAGE: dict[str, Callable[[Path, int], object]] = {
    "a bit of a picture": flip_in_a_picture,
    "zeros": lambda copy, place: overwrite(copy, place - 600, bytes(600)),
    "all zeros": lambda copy, place: copy.write_bytes(bytes(copy.stat().st_size)),
    "cut": lambda copy, place: os.truncate(copy, place),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("workers", [0, 2])
def test_damage_of_the_local_disk_changes_no_batch(
    tmp_path: Path, damage: str, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    shards, cache = write_shards(tmp_path / "shards", COUNTS), tmp_path / "cache"
    entry = open_folder(shards).locate(1).entry
    with web_server(shards, tmp_path / "log") as server:
        sound, _ = batches(shards, server, cache, workers)
        assert len(server.requests()) == len(COUNTS)
        (copy,) = cache.glob("00000-*.shard")
        DAMAGE[damage](copy, entry.image_offset + entry.image_size - 20)
        found, damaged = batches(shards, server, cache, workers)
        assert equal(found, sound)
        assert damaged == []
        assert [request.path for request in server.requests()[len(COUNTS) :]] == ["/00000.tar"]
        assert capfd.readouterr().err == f"data.remote.cache: {copy}: is damaged on the disk; fetched again\n"
        assert equal(batches(shards, server, cache)[0], sound)
        assert len(server.requests()) == len(COUNTS) + 1


def test_a_shard_that_is_damaged_where_it_lies_is_downloaded_once(tmp_path: Path) -> None:
    shards, cache = write_shards(tmp_path / "shards", COUNTS), tmp_path / "cache"
    entry = open_folder(shards).locate(1).entry
    overwrite(shards / "00000.tar", entry.image_offset + 100, bytes(entry.image_size - 100))
    with web_server(shards, tmp_path / "log") as server:
        for _ in range(2):
            _, damaged = batches(shards, server, cache)
            assert len(damaged) >= 1
            assert all(f'"key": "{entry.key}"' in line for line in damaged)
        assert len(server.requests()) == len(COUNTS)
