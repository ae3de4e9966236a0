"""The gallery for retrieval: slices of ranks, texts of every shape, damage left out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_scale.config import RetrievalConfig
from cosmos_scale.data.decode.torch_cpu import evaluation_image
from cosmos_scale.data.samples.caption_keys import KNOWN_KEYS, OTHER_NAMES
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.captioned import NAMED, GalleryBatch, LeftOut
from cosmos_scale.evaluation.gallery import Gallery
from cosmos_scale.testing.shard_files import flip_bytes, open_folder, picture, sample, write_shard, write_shards
from tests.evaluation.labelled import said_of_captions


def gallery(
    folder: Path,
    rank: int,
    world_size: int,
    key: str | None = "raw_caption",
    most: int | None = None,
    max_pixels: int = 10**6,
) -> list[GalleryBatch]:
    opened = Gallery(open_folder(folder), key, image_size=16, max_pixels=max_pixels, max_samples=most)
    return list(opened.batches(rank, world_size, 3))


@pytest.mark.parametrize("world_size", [1, 2, 3, 12])
def test_ranks_cover_each_sample_once_in_order(tmp_path: Path, world_size: int) -> None:
    folder = write_shards(tmp_path, [4, 5, 2])
    for most in (None, 7, 100):
        batches = [batch for rank in range(world_size) for batch in gallery(folder, rank, world_size, most=most)]
        ids = [number for batch in batches for number in batch.sample_ids.tolist()]
        assert ids == list(range(min(11, most or 11)))
        for batch in batches:
            assert len(batch.images) == len(batch.texts) == len(batch.sample_ids) <= 3
            for image, texts, number in zip(batch.images, batch.texts, batch.sample_ids.tolist(), strict=True):
                assert torch.equal(image, evaluation_image(picture(number), 16, 10**6))
                assert list(texts) == json.loads(sample(number)["json"])["raw_caption"]


def test_damaged_samples_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values: list[Any] = ["one text", ["x", " "], [], 5, None, [1], ["y"]]
    # Without the url, documents that hold no text at all would not be indexed.
    documents = [json.dumps({"t": value, "url": "u"}).encode() for value in values]
    members = [{**sample(number), "json": document} for number, document in enumerate(documents)]
    path = write_shard(tmp_path / "0.tar", members)
    index_shards(str(tmp_path), None, workers=1, progress=False)
    flip_bytes(path, open_folder(tmp_path).locate(6).entry.image_offset, 20)
    (batch,) = gallery(tmp_path, 0, 1, "t")
    assert batch.sample_ids.tolist() == [0, 1]
    assert [list(texts) for texts in batch.texts] == [["one text"], ["x"]]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1].split(" ")[1] for line in lines] == [f"{number:06d}" for number in (2, 3, 4, 5, 6)]


def test_a_wrong_key_is_an_error_on_every_rank_even_without_work(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [2])
    for rank in range(4):
        with pytest.raises(UserError, match=r"sample 000000 has no captions under 'caption'; its keys are raw_caption"):
            gallery(folder, rank, 4, "caption")


def documents(folder: Path, *values: dict[str, Any]) -> Path:
    """Index a shard with one sample for each document."""
    members = [{**sample(number), "json": json.dumps(value).encode()} for number, value in enumerate(values)]
    folder.mkdir(exist_ok=True)
    write_shard(folder / "0.tar", members)
    index_shards(str(folder), None, workers=1, progress=False)
    return folder


def opened(folder: Path, key: str | None, most: int | None = None) -> Gallery:
    return Gallery(open_folder(folder), key, image_size=16, max_pixels=10**6, max_samples=most)


def test_the_only_key_of_captions_is_taken(tmp_path: Path) -> None:
    origin = {"captions": "a.csv", "row": 1, "image": "1.jpg"}
    built = documents(tmp_path / "built", {"url": "u", "caption": "one", "origin": origin}, {"caption": "two"})
    assert opened(built, None).captions_key == "caption"
    (batch,) = gallery(built, 0, 1, None)
    assert [list(texts) for texts in batch.texts] == [["one"], ["two"]]
    other = documents(tmp_path / "other", {"url": "u"}, {"url": "u", "text": "one"})
    assert opened(other, None).captions_key == "text"
    # raw_caption goes first, whichever sample has it, as it always did.
    dreamlip = documents(tmp_path / "raw", {"longIB_captions": ["l"], "caption": "c"}, {"raw_caption": ["r"]})
    assert opened(dreamlip, None).captions_key == "raw_caption"


def test_further_captions_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the start of a run tells of its sources: the numbers are of fewer captions than the samples seem to have."""
    folder = documents(tmp_path, {"caption": "one"}, {"caption": "two", "re_caption": "2", "blip_caption": ["a two"]})
    section = RetrievalConfig.model_validate({"kind": "retrieval", "shards": str(folder)})
    assert said_of_captions(section, capsys) == (
        f"{folder}: its samples have text under blip_caption too, which is not read; rule: all captions of a picture "
        "are a list under one key; name the key: --captions KEY, in a run's eval section captions: KEY\n"
    )


def test_captions_of_txt_members_are_found(tmp_path: Path) -> None:
    members = [{"__key__": f"{number}", "jpg": picture(number), "txt": f"text {number}".encode()} for number in (0, 1)]
    write_shard(tmp_path / "0.tar", members)
    index_shards(str(tmp_path), None, workers=1, progress=False)
    (batch,) = gallery(tmp_path, 0, 1, None)
    assert [list(texts) for texts in batch.texts] == [["text 0"], ["text 1"]]


def test_several_keys_of_captions_are_named_with_the_option(tmp_path: Path) -> None:
    folder = documents(tmp_path, {"original_caption": "a", "caption": "b"}, {"caption": "c"}, {"url": "u"})
    with pytest.raises(UserError, match=r"original_caption \(1 sample\), caption \(2 samples\); .*--captions KEY"):
        opened(folder, None)


def test_where_no_key_is_known_the_keys_there_are_and_the_accepted_ones_are_named(tmp_path: Path) -> None:
    folder = documents(tmp_path, {"url": "u", "alt": "a"}, {"sha256": "1", "caption": 3})
    with pytest.raises(UserError) as refusal:
        opened(folder, None)
    said = str(refusal.value)
    assert "the keys there are: url, alt, sha256, caption;" in said
    assert all(f"{key}," in said or f"{key};" in said for key in (*KNOWN_KEYS, *OTHER_NAMES))


def test_samples_without_the_key_are_left_out_and_counted_wherever_they_lie(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking: list[dict[str, Any]] = [{"url": "u"}] * (NAMED + 5)
    folder = documents(tmp_path, *lacking, {"alt": "one"}, {"alt": ["two"]}, {"alt": 3, "url": "u"})
    gallery = opened(folder, "alt")
    (batch,) = gallery.batches(0, 1, 4)
    assert batch.sample_ids.tolist() == [NAMED + 5, NAMED + 6]
    assert gallery.left_out == LeftOut(without_captions=NAMED + 5, damaged=1)
    assert len(capsys.readouterr().err.splitlines()) == NAMED + 2  # the damaged one, and that more lack captions
    (batch,) = gallery.batches(0, 1, 4)  # for the next model
    assert gallery.left_out == LeftOut(without_captions=NAMED + 5, damaged=1)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=rf"its keys are url; no other of {NAMED} samples has captions there"):
        opened(folder, "alt", most=NAMED)


def test_nan_is_null_in_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values: list[Any] = ["a text", float("nan"), ["x", float("nan"), None, "y"], [float("nan")]]
    folder = documents(tmp_path, *({"t": value, "url": "u"} for value in values))
    (batch,) = gallery(folder, 0, 1, "t")
    assert [list(texts) for texts in batch.texts] == [["a text"], ["x", "y"]]
    said = capsys.readouterr().err
    assert (said.count("no captions under t"), said.count("t holds no text")) == (1, 1)


def test_a_key_in_capitals_is_found(tmp_path: Path) -> None:
    assert opened(documents(tmp_path, {"url": "u", "TEXT": "one"}), None).captions_key == "TEXT"
