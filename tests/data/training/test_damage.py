"""Damage through the whole loader: a bad sample costs one sample, the same at any number of workers and ranks."""

import json
import re
import subprocess
import sys
import tarfile
import warnings
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_scale.batch import Batch
from cosmos_scale.config import RunConfig
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.data.tools.inspect import picture_header
from cosmos_scale.data.training.loader import TrainLoader
from cosmos_scale.errors import ShardsToGiveUp, UserError
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.testing.shard_files import Member, flip_bytes, open_folder, sample, shards_config, write_shard
from tests.conftest import REPOSITORY
from tests.data.decode.damaged_pictures import (
    MAX_PIXELS,
    damaged_pictures,
    damaged_texts,
    huge_pictures,
    odd_pictures,
    odd_texts,
)

SAMPLES, BAD = 24, 9  # in two shards; the damaged sample lies in the middle of the first shard
DAMAGED: dict[str, tuple[dict[str, bytes], str]] = {
    **{f"picture: {name}": ({"jpg": data}, reason) for name, (data, reason) in damaged_pictures().items()},
    **{f"text: {name}": ({"json": data}, reason) for name, (data, reason) in damaged_texts().items()},
}
# Zeros replace the bytes that are cut off. A WebP's decoder takes zeros for pixels too, and WebP has no checksum.
IN_PLACE = {name: damage for name, damage in DAMAGED.items() if name != "picture: WebP without its end"}
ODD: dict[str, dict[str, bytes]] = {
    **{f"picture: {name}": {"jpg": data} for name, data in odd_pictures().items()},
    **{f"text: {name}": {"json": data} for name, data in odd_texts().items()},
}


def config_of(folder: Path, **data: Any) -> RunConfig:
    return shards_config(folder, max_pixels=MAX_PIXELS, **data)


def take(
    folder: Path,
    config: RunConfig,
    start: int,
    count: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    log: Path | None = None,
) -> list[Batch]:
    tokenizer = Tokenizer(config.model.text.context_length)
    loader = TrainLoader(config, open_folder(folder), tokenizer, rank, world_size, log)
    with closing(loader.batches(start)) as batches:
        return list(islice(batches, count))


def write(folder: Path, others: dict[int, dict[str, bytes]]) -> Path:
    """Write two shards; some samples have other members."""
    folder.mkdir(parents=True, exist_ok=True)
    members: list[Member] = [{**sample(number), **others.get(number, {})} for number in range(SAMPLES)]
    write_shard(folder / "0.tar", members[:13])
    write_shard(folder / "1.tar", members[13:])
    return folder


def index(folder: Path) -> Path:
    index_shards(str(folder), None, workers=1, progress=False)
    return folder


def both_ways(
    folder: Path, bad: dict[int, dict[str, bytes]], odd: dict[int, dict[str, bytes]] | None = None
) -> tuple[Path, Path]:
    """The same shards, sound and damaged after indexing, with the same index. odd: other samples that are sound."""
    odd = odd or {}
    sound = {number: {extension: sample(number)[extension] for extension in bad[number]} for number in bad}
    before = index(write(folder / "before", odd | padded(sound, bad)))
    after = index(write(folder / "after", odd | padded(sound, bad)))
    write(after, odd | padded(bad, sound))
    for name in ("0.tar", "1.tar"):
        assert (before / name).stat().st_size == (after / name).stat().st_size
    return before, after


def padded(members: dict[int, dict[str, bytes]], others: dict[int, dict[str, bytes]]) -> dict[int, dict[str, bytes]]:
    """Pad members to the sizes of others, so that all lie at the same places; the padding is no damage by itself."""
    fill = {"json": b" ", "jpg": b"\x00"}
    return {
        number: {
            extension: data.ljust(len(others[number][extension]), fill[extension]) for extension, data in own.items()
        }
        for number, own in members.items()
    }


def assert_one_lost(before: list[Batch], after: list[Batch], bad: set[int]) -> int:
    """All sound samples are the same at the same places, bit for bit; returns how many were substituted."""
    substituted = 0
    for left, right in zip(before, after, strict=True):
        hit = torch.tensor([number in bad for number in left.sample_ids.tolist()])
        for name, dim in (("global_crops", 1), ("local_crops", 1), ("captions", 1), ("sample_ids", 0)):
            kept = (~hit).nonzero().flatten()
            one, other = getattr(left, name).index_select(dim, kept), getattr(right, name).index_select(dim, kept)
            assert torch.equal(one, other), name
        assert int(right.substituted) == int(hit.sum())
        assert not bad & set(right.sample_ids.tolist())
        substituted += int(right.substituted)
    return substituted


@pytest.mark.parametrize("name", IN_PLACE)
def test_damage_behind_a_good_index_costs_one_sample(tmp_path: Path, name: str) -> None:
    members, reason = DAMAGED[name]
    if members.get("jpg") == b"":
        reason = "the picture is not"  # zeros replace the picture
    before, after = both_ways(tmp_path, {BAD: members})
    sound = take(before, config_of(before), 0, 12)
    log = tmp_path / "damaged.jsonl"
    damaged = take(after, config_of(after), 0, 12, log=log)
    assert sorted(torch.cat([batch.sample_ids for batch in sound]).tolist()) == sorted([*range(SAMPLES)] * 2)
    assert assert_one_lost(sound, damaged, {BAD}) == 2  # once in each epoch
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["epoch"], line["sample"]) for line in lines] == [(0, BAD), (1, BAD)]
    for line in lines:
        assert (line["source"], line["shard"], line["key"]) == ("test", str(after / "0.tar"), f"{BAD:06d}")
        assert line["reason"].startswith(reason), line["reason"]


def test_the_log_says_where_a_damaged_sample_was_built_from(tmp_path: Path) -> None:
    origin = {"captions": "c.csv", "row": 9, "image": "a/9.jpg"}
    text = json.dumps({"raw_caption": 7, "origin": origin}).encode()
    folder = index(write(tmp_path / "shards", {BAD: {"json": text}}))
    log = tmp_path / "damaged.jsonl"
    for _ in range(2):  # the second run knows the line as its own, and does not write it again
        take(folder, config_of(folder), 0, 6, log=log)
    (line,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert (line["sample"], line["origin"]) == (BAD, "c.csv row 9, a/9.jpg")


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_before_indexing_costs_one_sample(tmp_path: Path, name: str) -> None:
    """The index rejects damage that shows without decoding; the loader finds all other damage."""
    members, reason = DAMAGED[name]
    folder = index(write(tmp_path / "shards", {BAD: members}))
    rejected = folder / "rejected.jsonl"
    samples = SAMPLES - rejected.exists()
    log = tmp_path / "damaged.jsonl"
    config = config_of(folder, last_batch="pad")
    batches = take(folder, config, 0, 6, log=log)
    keys = [open_folder(folder).locate(number).entry.key for batch in batches for number in batch.sample_ids.tolist()]
    assert {int(key) for key in keys} == {*range(SAMPLES)} - {BAD}
    if rejected.exists():
        (line,) = [json.loads(line) for line in rejected.read_text().splitlines()]
        assert (line["shard"], line["key"]) == ("0.tar", f"{BAD:06d}")
        assert not log.exists()
        assert len(open_folder(folder)) == samples
    else:
        assert sum(int(batch.substituted) for batch in batches) == 1
        (line,) = [json.loads(line) for line in log.read_text().splitlines()]
        assert line["key"] == f"{BAD:06d}"
        assert line["reason"].startswith(reason)


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_but_sound_trains(tmp_path: Path, name: str) -> None:
    folder = index(write(tmp_path / "shards", {BAD: ODD[name]}))
    batches = take(folder, config_of(folder), 0, 6)
    assert sorted(torch.cat([batch.sample_ids for batch in batches]).tolist()) == [*range(SAMPLES)]
    assert sum(int(batch.substituted) for batch in batches) == 0
    for batch in batches:
        assert batch.global_crops.dtype == torch.uint8
        assert (batch.caption_lengths >= 2).all()


def missing_json(archive: Path) -> None:
    members = [sample(number) for number in range(13)]
    del members[BAD]["json"]
    write_shard(archive, members)


def cut_off(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes()[: place_of(archive, BAD) + 700])


def place_of(archive: Path, number: int) -> int:
    with tarfile.open(archive) as opened:
        return opened.getmember(f"{number:06d}.jpg").offset


def test_missing_members_and_cut_tars_before_indexing(tmp_path: Path) -> None:
    folder = write(tmp_path / "missing", {})
    missing_json(folder / "0.tar")
    assert keys_of_an_epoch(index(folder)) == {*range(SAMPLES)} - {BAD}
    folder = write(tmp_path / "cut", {})
    cut_off(folder / "0.tar")
    assert keys_of_an_epoch(index(folder)) == {*range(BAD), *range(13, SAMPLES)}  # the samples before the cut are kept


def keys_of_an_epoch(folder: Path) -> set[int]:
    config = config_of(folder, last_batch="pad")
    opened = open_folder(folder)
    steps = -(-len(opened) // config.train.global_batch)
    batches = take(folder, config, 0, steps)
    assert sum(int(batch.substituted) for batch in batches) == 0
    return {int(opened.locate(number).entry.key) for batch in batches for number in batch.sample_ids.tolist()}


def test_a_tar_header_that_was_overwritten(tmp_path: Path) -> None:
    before, after = both_ways(tmp_path, {})
    flip_bytes(after / "0.tar", place_of(after / "0.tar", BAD), 512)
    log = tmp_path / "damaged.jsonl"
    sound, damaged = take(before, config_of(before), 0, 6), take(after, config_of(after), 0, 6, log=log)
    assert assert_one_lost(sound, damaged, {BAD}) == 1
    (line,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert line["reason"].endswith("the shard has changed or is damaged")


def test_a_tar_that_was_cut_off_after_indexing_is_lost(tmp_path: Path) -> None:
    """Not only the samples behind the cut: the bytes before the cut may belong to other samples by now."""
    _, after = both_ways(tmp_path, {})
    cut_off(after / "0.tar")
    with pytest.raises(ShardsToGiveUp) as loss:
        take(after, config_of(after), 0, 6)
    (reason,) = loss.value.shards.values()
    assert re.fullmatch(r"has \d+ bytes, but its index was made when it had \d+", reason)


@pytest.fixture(scope="module")
def half_damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, set[int]]:
    """Every second sample has damage of its own, so that substitutes are damaged too; the others are odd but sound."""
    kinds, odd_kinds = [members for members, _ in IN_PLACE.values()], list(ODD.values())
    bad = {number: kinds[number % len(kinds)] for number in range(0, SAMPLES, 2)}
    odd = {number: odd_kinds[number // 2 % len(odd_kinds)] for number in range(1, SAMPLES, 2)}
    return (*both_ways(tmp_path_factory.mktemp("half"), bad, odd), set(bad))


def test_substitutes_are_the_same_everywhere(half_damaged: tuple[Path, Path, set[int]], tmp_path: Path) -> None:
    before, after, bad = half_damaged
    sound = take(before, config_of(before), 0, 12)
    log = tmp_path / "alone.jsonl"
    whole = take(after, config_of(after, max_damaged=1.0), 0, 12, log=log)
    assert assert_one_lost(sound, whole, bad) == SAMPLES
    expected = named(log)
    assert len(log.read_text().splitlines()) > SAMPLES, "no substitute was damaged itself"
    for workers, world_size, start in ((2, 1, 0), (0, 2, 0), (1, 4, 0), (0, 1, 7), (1, 2, 5)):
        config = config_of(after, max_damaged=1.0, workers=workers)
        log = tmp_path / f"{workers}-{world_size}-{start}.jsonl"
        ranks = [
            take(after, config, start, 12 - start, rank=rank, world_size=world_size, log=log)
            for rank in range(world_size)
        ]
        for parts, batch in zip(zip(*ranks, strict=True), whole[start:], strict=True):
            for name, dim in (("global_crops", 1), ("local_crops", 1), ("captions", 1), ("sample_ids", 0)):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim), getattr(batch, name)), name
            assert sum(int(part.substituted) for part in parts) == int(batch.substituted)
        # Workers read ahead, but damage in batches that were not asked for is not written yet.
        assert named(log) == {line for line in expected if json.loads(line)["step"] >= start}


def test_both_decoders_find_the_same_damage(half_damaged: tuple[Path, Path, set[int]], tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI, which has no wheel for this machine")
    _, after, _ = half_damaged
    made, found = [], []
    for decoder in ("torch", "dali"):
        log = tmp_path / f"{decoder}.jsonl"
        made.append(take(after, config_of(after, max_damaged=1.0, decoder=decoder), 0, 12, log=log))
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        # DALI reads some batches ahead of the batches that were asked for.
        found.append([(line["step"], line["sample"], line["key"]) for line in lines if line["step"] < 12])
    assert found[0] == found[1]
    for one, other in zip(*made, strict=True):
        for name in ("captions", "caption_lengths", "sample_ids", "substituted"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        # Crops of 8-bit noise by two resizers, colours by two libraries: some levels of 255.
        assert (one.global_crops.float() - other.global_crops.float()).abs().mean() < 4


def named(log: Path) -> set[str]:
    """The lines of a log without the rank that wrote them. A step may come upon the same sample twice."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {json.dumps({name: value for name, value in line.items() if name != "rank"}) for line in lines}


def test_training_goes_on_up_to_the_limit_and_stops_past_it(half_damaged: tuple[Path, Path, set[int]]) -> None:
    _, after, _ = half_damaged
    # A share of at least 1,000 tries: 24 visits in 12 steps meet 24 damaged samples or more, substitutes included.
    for limit, steps in ((0.2, 12), (1.0, 40)):
        assert len(take(after, config_of(after, max_damaged=limit), 0, steps)) == steps
    with pytest.raises(UserError, match=r"samples are damaged, more than data\.max_damaged 0\.01 allows"):
        take(after, config_of(after, max_damaged=0.01), 0, 12)


PROBE = """
import resource, sys
from cosmos_scale.data.decode.picture import decode_rgbx
from cosmos_scale.data.tools.inspect import picture_header
from cosmos_scale.data.samples.sample import DamagedSample
from tests.data.decode.damaged_pictures import MAX_PIXELS, huge_pictures
from cosmos_scale.testing.shard_files import picture
decode_rgbx(picture(0, "WEBP"), MAX_PIXELS)  # every library is loaded
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (48 << 20),) * 2)
for name, (data, side) in huge_pictures().items():
    for read in (decode_rgbx, picture_header):
        try:
            read(data, MAX_PIXELS)
        except DamagedSample as damage:
            print(name, side, damage)
"""


def test_huge_pictures_are_refused_before_anything_is_allocated() -> None:
    """In a process that may take 48 MiB more: the smallest of the pictures needs 190 MB for its pixels."""
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    said = f"{MAX_PIXELS}"
    expected = [
        f"{name} {side} the picture has {side} x {side} pixels, more than max_pixels {said}"
        for name, (_, side) in huge_pictures().items()
        for _ in range(2)
    ]
    assert (done.stdout.splitlines(), done.stderr) == (expected, "")


def test_the_configs_limit_alone_decides() -> None:
    """Pillow's own limit would warn of a large picture and refuse a larger picture, whatever the config allows."""
    png, side = huge_pictures()["PNG"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture_header(png, side * side) == ("PNG RGB", side, side)
        with pytest.raises(DamagedSample, match="more than max_pixels"):
            picture_header(png, side * side - 1)
