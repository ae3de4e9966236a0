"""A source without captions is refused before the run, with the keys that its samples have."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.config import CaptionsConfig
from cosmos_scale.data.samples.caption_keys import DREAMLIP_KEYS, OTHER_NAMES
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.data.shards.reader import DEFAULT_REMOTE, ShardReader
from cosmos_scale.data.training.caption_check import check_captions
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import open_folder, picture, write_shard, write_shards


def shards_of(folder: Path, documents: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for shard in range(0, len(documents), 10):
        samples = [
            {"__key__": f"{shard:03d}{place}", "jpg": picture(0), "json": json.dumps(document).encode()}
            for place, document in enumerate(documents[shard : shard + 10])
        ]
        write_shard(folder / f"{shard:05d}.tar", samples)
    index_shards(str(folder), None, workers=1, progress=False)
    return folder


def check(folder: Path, **captions: Any) -> list[str]:
    return check_captions(open_folder(folder), CaptionsConfig(**captions), DEFAULT_REMOTE)


def test_a_source_without_captions_is_refused_with_its_keys(tmp_path: Path) -> None:
    folder = shards_of(tmp_path / "s", [{"blip": "a dog", "url": "x"}] * 7 + [{"blip": "a cat", "width": 3}] * 80)
    needs = re.escape(
        "data source test: no caption in any sample looked at: sampling textcrop needs one of raw_caption"
    )
    with pytest.raises(UserError, match=needs + ".*title; the samples have blip, url, width; rule: data.captions.keys"):
        check(folder)
    for sampling, known in (("textcrop", DREAMLIP_KEYS), ("textcrop_pixelprose", ("original_caption", "caption"))):
        with pytest.raises(UserError) as refusal:
            check(folder, sampling=sampling)
        accepted = re.findall(r"\w+", str(refusal.value).partition(" needs one of ")[2].partition(";")[0])
        assert set(accepted) >= {*known, "caption", *OTHER_NAMES}  # all of them are named
    check(folder, keys=["blip"])
    with pytest.raises(UserError, match=re.escape("data.captions.keys needs one of BLIP; the samples have blip")):
        check(folder, keys=["BLIP"])


def test_keys_of_another_sampling_are_named(tmp_path: Path) -> None:
    folder = shards_of(tmp_path / "s", [{"original_caption": "a dog", "url": "x"}] * 3)
    with pytest.raises(UserError, match=r"rule: data\.captions\.sampling may fit original_caption, or data"):
        check(folder)
    check(folder, sampling="textcrop_pixelprose")


def test_further_captions_that_are_not_read_are_told(tmp_path: Path) -> None:
    document = {"caption": "a dog", "re_caption": "a brown dog", "caption_id": 7, "caption_2": " ", "title": "Rex"}
    folder = shards_of(tmp_path / "s", [document] * 3)
    for sampling in ("textcrop", "random"):
        assert check(folder, sampling=sampling) == [
            "data source test: its samples have text under re_caption too, which is not read; rule: data.captions.keys "
            "names all that is read, such as [caption, re_caption]"
        ]
    assert check(folder, keys=["caption"]) == []
    assert check(folder, sampling="raw") == []


def test_one_caption_is_enough_and_mostly_one_sample_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    reading = ShardReader.read

    def note(self: ShardReader, location: Any) -> Any:
        read.append(location.entry.key)
        return reading(self, location)

    monkeypatch.setattr(ShardReader, "read", note)
    check(write_shards(tmp_path / "a", [3, 4]))
    assert read == ["000000"]
    check(shards_of(tmp_path / "b", [{"url": "x"}] * 55 + [{"caption": "a dog"}]))
    assert len(read) == 1 + 56
